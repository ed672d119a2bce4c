// Hands on the map: pointer, wheel, pinch and keys, all acting on the shared view.

import { LANE, toStep } from "./axis.js";

/** @typedef {import("./map.js").LayerMap} LayerMap */

const DRAG_FROM = 4;

/** @param {LayerMap} map */
export function steer(map) {
  const { over, view } = map;
  /** @type {Map<number, number>} pointer id -> x */
  const held = new Map();
  let travelled = 0;

  /** @param {{clientX: number}} event */
  const stepAt = (event) => toStep(map.frame, view.now, event.clientX - over.getBoundingClientRect().left);
  /** @param {{clientY: number}} event */
  const rowAt = (event) => Math.floor((event.clientY - over.getBoundingClientRect().top - LANE) / map.rowHeight);
  /** @param {PointerEvent | MouseEvent} event */
  const hover = (event) => {
    const step = stepAt(event);
    const inside = step >= view.now.from && step < view.now.to;
    view.set({ step: inside ? Math.max(0, Math.floor(step)) : view.now.pinned });
    map.over.dispatchEvent(new CustomEvent("row", { detail: inside ? rowAt(event) : -1 }));
  };
  /** @param {number} x @param {number} id */
  const drag = (x, id) => {
    const before = [...held.values()];
    const moved = x - (held.get(id) ?? x);
    held.set(id, x);
    travelled += Math.abs(moved);
    const after = [...held.values()];
    if (after.length === 2) {
      const middle = toStep(map.frame, view.now, (after[0] + after[1]) / 2 - over.getBoundingClientRect().left);
      const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(after[0] - after[1])];
      if (was > 8 && is > 8) view.zoom(was / is, middle);
    } else if (travelled > DRAG_FROM) {
      view.pan(-moved / (map.frame.width - map.frame.left - map.frame.right));
    }
  };

  over.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    held.set(event.pointerId, event.clientX);
    travelled = 0;
    over.setPointerCapture(event.pointerId);
  });
  over.addEventListener("pointermove", (event) => {
    if (held.has(event.pointerId)) drag(event.clientX, event.pointerId);
    hover(event);
  });
  over.addEventListener("pointerup", (event) => {
    if (!held.delete(event.pointerId) || travelled > DRAG_FROM) return;
    const name = map.tile?.parameters[rowAt(event)];
    const step = stepAt(event);
    const pinned = step >= view.now.from && step < view.now.to ? Math.max(0, Math.floor(step)) : view.now.pinned;
    view.set({ pinned, step: pinned, parameter: name ?? view.now.parameter });
  });
  over.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  over.addEventListener("pointerleave", () => {
    view.set({ step: view.now.pinned });
    map.over.dispatchEvent(new CustomEvent("row", { detail: -1 }));
  });
  over.addEventListener("dblclick", (event) => view.zoom(0.25, stepAt(event)));
  over.addEventListener(
    "wheel",
    (event) => {
      const zooms = event.ctrlKey || event.metaKey || document.activeElement === over;
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) view.pan(event.deltaX / 800);
      else if (event.shiftKey) view.pan(event.deltaY / 800);
      else if (zooms) view.zoom(Math.exp(event.deltaY / 300), stepAt(event));
      else return;
      event.preventDefault();
    },
    { passive: false },
  );
  over.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !pressed(map, event.key)) return;
    event.preventDefault();
  });
}

/** @param {LayerMap} map @param {string} key @returns {boolean} whether it meant something */
function pressed(map, key) {
  const { view } = map;
  const { from, to, step } = view.now;
  const centre = step !== null && step >= from && step < to ? step + 0.5 : (from + to) / 2;
  /** @type {Record<string, () => void>} */
  const keys = {
    "+": () => view.zoom(0.5, centre),
    "=": () => view.zoom(0.5, centre),
    "-": () => view.zoom(2, centre),
    0: () => view.all(),
    PageDown: () => view.pan(0.5),
    PageUp: () => view.pan(-0.5),
    Home: () => view.look(0, to - from),
    End: () => view.look(view.now.end - (to - from), view.now.end),
    ArrowRight: () => walk(map, 1),
    ArrowLeft: () => walk(map, -1),
    ArrowDown: () => choose(map, 1),
    ArrowUp: () => choose(map, -1),
    Escape: () => view.set({ step: null, pinned: null, parameter: null }),
  };
  if (!Object.hasOwn(keys, key)) return false;
  keys[key]();
  return true;
}

/** Move the crosshair to the next sample that has a pixel of its own. @param {LayerMap} map @param {number} way */
function walk({ view, tile, frame }, way) {
  const { from, to, end } = view.now;
  const pixel = (to - from) / (frame.width - frame.left - frame.right);
  const start = view.now.step ?? Math.floor((from + to) / 2);
  const steps = tile?.steps ?? [];
  const next = way > 0 ? steps.find((step) => step >= start + Math.max(1, pixel)) : steps.findLast((step) => step <= start - Math.max(1, pixel));
  const step = Math.min(Math.max(next ?? start, 0), end - 1);
  view.set({ step, pinned: step });
  if (step < from || step >= to) view.look(step - (to - from) / 2, step + (to - from) / 2);
}

/** @param {LayerMap} map @param {number} way */
function choose({ view, tile }, way) {
  const names = tile?.parameters ?? [];
  const at = view.now.parameter === null ? -1 : names.indexOf(view.now.parameter);
  view.set({ parameter: names[Math.min(Math.max(at + way, 0), names.length - 1)] ?? null });
}
