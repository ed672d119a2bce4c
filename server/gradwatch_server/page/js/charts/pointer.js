// Pointer, wheel and pinch on a chart move the crosshair, pan and zoom.

import { plotWidth, toStep } from "./axis.js";

/** @typedef {import("../data/viewport.js").Viewport} Viewport */
/**
 * @typedef {object} PointerListeners
 * @property {(event: MouseEvent | null) => void} [hover] null: the pointer has left
 * @property {(event: MouseEvent) => void} [click] not called at the end of a drag
 */

const DRAG_PIXELS = 4;
const PINCH_PIXELS = 8;

/**
 * @param {HTMLElement} element @param {Viewport} viewport
 * @param {() => import("./axis.js").Frame} frame @param {PointerListeners} [listeners]
 */
export function listenToPointer(element, viewport, frame, listeners = {}) {
  /** Pointers that are down: pointer id -> x. @type {Map<number, number>} */
  const pressed = new Map();
  let travelled = 0;

  /** @param {number} clientX */
  const stepAt = (clientX) => toStep(frame(), viewport.state, clientX - element.getBoundingClientRect().left);
  /** @param {MouseEvent} event */
  const visibleStep = (event) => {
    const step = stepAt(event.clientX);
    return step >= viewport.state.from && step < viewport.state.to ? Math.max(0, Math.floor(step)) : null;
  };
  /** @param {number} x @param {number} id */
  const drag = (x, id) => {
    const before = [...pressed.values()];
    const moved = x - (pressed.get(id) ?? x);
    pressed.set(id, x);
    travelled += Math.abs(moved);
    const after = [...pressed.values()];
    if (after.length === 2) {
      const [was, is] = [Math.abs(before[0] - before[1]), Math.abs(after[0] - after[1])];
      if (was > PINCH_PIXELS && is > PINCH_PIXELS) viewport.zoom(was / is, stepAt((after[0] + after[1]) / 2));
    } else if (travelled > DRAG_PIXELS) {
      viewport.pan(-moved / plotWidth(frame()));
    }
  };

  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pressed.set(event.pointerId, event.clientX);
    travelled = 0;
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    if (pressed.has(event.pointerId)) drag(event.clientX, event.pointerId);
    viewport.set({ step: visibleStep(event) ?? viewport.state.pinned });
    listeners.hover?.(event);
  });
  element.addEventListener("pointerup", (event) => {
    if (!pressed.delete(event.pointerId) || travelled > DRAG_PIXELS) return;
    const step = visibleStep(event);
    if (step !== null) viewport.set({ pinned: step, step });
    listeners.click?.(event);
  });
  element.addEventListener("pointercancel", (event) => pressed.delete(event.pointerId));
  element.addEventListener("pointerleave", () => {
    viewport.set({ step: viewport.state.pinned });
    listeners.hover?.(null);
  });
  element.addEventListener("dblclick", (event) => viewport.zoom(0.25, stepAt(event.clientX)));
  const turn = (/** @type {WheelEvent} */ event) => turnWheel(event, element, viewport, stepAt(event.clientX));
  element.addEventListener("wheel", turn, { passive: false });
}

/**
 * Sideways pans. Up and down scrolls the page, or zooms where a key is held or the chart has the focus.
 * @param {WheelEvent} event @param {HTMLElement} element @param {Viewport} viewport @param {number} step
 */
function turnWheel(event, element, viewport, step) {
  const zooms = event.ctrlKey || event.metaKey || document.activeElement === element;
  if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) viewport.pan(event.deltaX / 800);
  else if (event.shiftKey) viewport.pan(event.deltaY / 800);
  else if (zooms) viewport.zoom(Math.exp(event.deltaY / 300), step);
  else return;
  event.preventDefault();
}
