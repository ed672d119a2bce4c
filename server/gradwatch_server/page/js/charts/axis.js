// The step axis and where things lie on it.

import { count } from "../data/format.js";

export const LANE = 18; // the lane of alerts above the map
export const AXIS = 24; // the step axis below it

/** @typedef {{left: number, right: number, width: number}} Frame the plot's edges within its box, in CSS pixels */

/** The plot's edges: every part of a run's page has the same, so that steps line up. @param {number} width @returns {Frame} */
export function frame(width) {
  return { left: width >= 640 ? 150 : 74, right: 10, width };
}

/** @param {Frame} box @param {{from: number, to: number}} range @param {number} step */
export function toX(box, range, step) {
  return box.left + ((step - range.from) / (range.to - range.from)) * (box.width - box.left - box.right);
}

/** @param {Frame} box @param {{from: number, to: number}} range @param {number} x */
export function toStep(box, range, x) {
  return range.from + ((x - box.left) / (box.width - box.left - box.right)) * (range.to - range.from);
}

/** Round steps, at most about `most` of them. @param {number} from @param {number} to @param {number} most */
export function ticks(from, to, most) {
  const rough = Math.max(1, (to - from) / Math.max(1, most));
  const decade = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((unit) => unit * decade).find((unit) => unit >= rough) ?? decade * 10;
  const found = [];
  for (let step = Math.ceil(from / stride) * stride; step < to; step += stride) found.push(step);
  return found;
}

/**
 * @param {CanvasRenderingContext2D} context @param {Frame} box @param {{from: number, to: number}} range
 * @param {number} top @param {{soft: string, line: string, font: string}} theme
 */
export function drawAxis(context, box, range, top, theme) {
  context.font = theme.font;
  context.fillStyle = theme.soft;
  context.strokeStyle = theme.line;
  context.textBaseline = "top";
  context.textAlign = "center";
  // A bucket is as wide as its steps: the label stands in the middle of its own step.
  const half = ((box.width - box.left - box.right) / (range.to - range.from)) * 0.5;
  for (const step of ticks(range.from, range.to, (box.width - box.left - box.right) / 80)) {
    const x = toX(box, range, step) + Math.min(half, 60);
    if (x > box.width - box.right) continue;
    context.beginPath();
    context.moveTo(Math.round(x) + 0.5, top);
    context.lineTo(Math.round(x) + 0.5, top + 4);
    context.stroke();
    const text = count(step);
    const reach = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(x, box.left + reach), box.width - reach), top + 6);
  }
}
