// Hands on a chart: pointer, wheel and pinch, all acting on the shared view.

import { toStep } from "./axis.js";

/**
 * @typedef {object} Hands
 * @property {(event: MouseEvent | null) => void} [hover] null: the pointer has left
 * @property {(event: MouseEvent) => void} [click] not the end of a drag
 */

const DRAG_FROM = 4;

/**
 * @param {HTMLElement} element @param {import("../data/viewport.js").View} view
 * @param {() => import("./axis.js").Frame} frame @param {Hands} [hands]
 */
export function steer(element, view, frame, hands = {}) {
  /** @type {Map<number, number>} pointer id -> x */
  const held = new Map();
  let travelled = 0;

  /** @param {{clientX: number}} event */
  const stepAt = (event) => toStep(frame(), view.now, event.clientX - element.getBoundingClientRect().left);
  /** @param {MouseEvent} event */
  const inside = (event) => {
    const step = stepAt(event);
    return step >= view.now.from && step < view.now.to ? Math.max(0, Math.floor(step)) : null;
  };
  /** @param {number} x @param {number} id */
  const drag = (x, id) => {
    const before = [...held.values()];
    const moved = x - (held.get(id) ?? x);
    held.set(id, x);
    travelled += Math.abs(moved);
    const after = [...held.values()];
    if (after.length === 2) {
      const middle = stepAt({ clientX: (after[0] + after[1]) / 2 });
      const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(after[0] - after[1])];
      if (was > 8 && is > 8) view.zoom(was / is, middle);
    } else if (travelled > DRAG_FROM) {
      const { left, right, width } = frame();
      view.pan(-moved / (width - left - right));
    }
  };

  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    held.set(event.pointerId, event.clientX);
    travelled = 0;
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (held.has(event.pointerId)) drag(event.clientX, event.pointerId);
    const step = inside(event);
    view.set({ step: step ?? view.now.pinned });
    hands.hover?.(event);
  });
  element.addEventListener("pointerup", (event) => {
    if (!held.delete(event.pointerId) || travelled > DRAG_FROM) return;
    const step = inside(event);
    if (step !== null) view.set({ pinned: step, step });
    hands.click?.(event);
  });
  element.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  element.addEventListener("pointerleave", () => {
    view.set({ step: view.now.pinned });
    hands.hover?.(null);
  });
  element.addEventListener("dblclick", (event) => view.zoom(0.25, stepAt(event)));
  element.addEventListener("wheel", (event) => wheeled(event, element, view, stepAt(event)), { passive: false });
}

/** Sideways pans; up and down zooms where that cannot be meant for the page. @param {WheelEvent} event @param {HTMLElement} element @param {import("../data/viewport.js").View} view @param {number} step */
function wheeled(event, element, view, step) {
  const zooms = event.ctrlKey || event.metaKey || document.activeElement === element;
  if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) view.pan(event.deltaX / 800);
  else if (event.shiftKey) view.pan(event.deltaY / 800);
  else if (zooms) view.zoom(Math.exp(event.deltaY / 300), step);
  else return;
  event.preventDefault();
}
