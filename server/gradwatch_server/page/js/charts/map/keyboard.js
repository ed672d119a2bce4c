// Keyboard control of the map: everything that the pointer can do.

import { plotWidth } from "../axis.js";

/** @typedef {import("./layer-map.js").LayerMap} LayerMap */

/** @param {LayerMap} map */
export function listenToKeyboard(map) {
  map.over.addEventListener("keydown", (event) => {
    const action = actions(map)[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    action();
    event.preventDefault();
  });
}

/** Return the actions of the keys. @param {LayerMap} map @returns {Partial<Record<string, () => void>>} */
function actions(map) {
  const { viewport } = map;
  const { from, to, end } = viewport.state;
  return {
    "+": () => viewport.zoom(0.5, viewport.centre),
    "=": () => viewport.zoom(0.5, viewport.centre),
    "-": () => viewport.zoom(2, viewport.centre),
    0: () => viewport.showAll(),
    PageDown: () => viewport.pan(0.5),
    PageUp: () => viewport.pan(-0.5),
    Home: () => viewport.showRange(0, to - from),
    End: () => viewport.showRange(end - (to - from), end),
    ArrowRight: () => moveCrosshair(map, 1),
    ArrowLeft: () => moveCrosshair(map, -1),
    ArrowDown: () => moveChoice(map, 1),
    ArrowUp: () => moveChoice(map, -1),
    Escape: () => viewport.set({ step: null, pinned: null, parameter: null, kept: null, alert: null }),
  };
}

/**
 * Move the crosshair to the next sample that has a pixel of its own.
 * @param {LayerMap} map @param {1 | -1} direction
 */
function moveCrosshair({ viewport, tile, frame }, direction) {
  const { from, to, end } = viewport.state;
  const pixel = Math.max(1, (to - from) / plotWidth(frame));
  const start = viewport.state.step ?? Math.floor((from + to) / 2);
  const steps = tile?.steps ?? [];
  const next =
    direction > 0 ? steps.find((step) => step >= start + pixel) : steps.findLast((step) => step <= start - pixel);
  const step = Math.min(Math.max(next ?? start, 0), end - 1);
  viewport.set({ step, pinned: step });
  if (step < from || step >= to) viewport.showRange(step - (to - from) / 2, step + (to - from) / 2);
}

/** Choose the parameter of the next row. @param {LayerMap} map @param {1 | -1} direction */
function moveChoice({ viewport, tile }, direction) {
  const names = tile?.parameters ?? [];
  const row = viewport.state.parameter === null ? -1 : names.indexOf(viewport.state.parameter);
  viewport.set({ parameter: names[Math.min(Math.max(row + direction, 0), names.length - 1)] ?? null });
}
