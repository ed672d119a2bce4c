// The axis of steps that all charts of a page share, and where steps lie on it.

import { count } from "../data/format.js";

export const ALERT_LANE = 18; // height of the lane of alerts above the map, in CSS pixels
export const AXIS = 24; // height of the axis below the map, in CSS pixels

/** @typedef {{left: number, right: number, width: number}} Frame margins and width of a chart, in CSS pixels */
/** @typedef {{from: number, to: number}} StepRange `to` exclusive */

/**
 * Return the frame of a chart: all charts of a page have the same margins, so that their steps line up.
 * @param {number} width @returns {Frame}
 */
export function frame(width) {
  return { left: width >= 640 ? 150 : 74, right: 10, width };
}

/** @param {Frame} frame */
export const plotWidth = ({ left, right, width }) => width - left - right;

/** @param {Frame} frame @param {StepRange} range @param {number} step */
export function toX(frame, range, step) {
  return frame.left + ((step - range.from) / (range.to - range.from)) * plotWidth(frame);
}

/** @param {Frame} frame @param {StepRange} range @param {number} x */
export function toStep(frame, range, x) {
  return range.from + ((x - frame.left) / plotWidth(frame)) * (range.to - range.from);
}

/**
 * Return where the crosshair stands: in the middle of its step, unless a step is wide.
 * @param {Frame} frame @param {StepRange} range @param {number} step
 */
export function crosshairX(frame, range, step) {
  return toX(frame, range, step + Math.min(0.5, (range.to - range.from) / 40));
}

/** Return round steps, at most about `most` of them. @param {number} from @param {number} to @param {number} most */
export function ticks(from, to, most) {
  const rough = Math.max(1, (to - from) / Math.max(1, most));
  const decade = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((unit) => unit * decade).find((unit) => unit >= rough) ?? decade * 10;
  const steps = [];
  for (let step = Math.ceil(from / stride) * stride; step < to; step += stride) steps.push(step);
  return steps;
}

/**
 * @param {CanvasRenderingContext2D} context @param {Frame} frame @param {StepRange} range
 * @param {number} top @param {{soft: string, line: string, font: string}} theme
 */
export function drawAxis(context, frame, range, top, theme) {
  context.font = theme.font;
  context.fillStyle = theme.soft;
  context.strokeStyle = theme.line;
  context.textBaseline = "top";
  context.textAlign = "center";
  const width = plotWidth(frame);
  // A step is as wide as its bucket: its label stands in the middle.
  const half = Math.min((width / (range.to - range.from)) * 0.5, 60);
  for (const step of ticks(range.from, range.to, width / 80)) {
    const x = toX(frame, range, step) + half;
    if (x > frame.width - frame.right) continue;
    context.beginPath();
    context.moveTo(Math.round(x) + 0.5, top);
    context.lineTo(Math.round(x) + 0.5, top + 4);
    context.stroke();
    const text = count(step);
    const reach = context.measureText(text).width / 2;
    context.fillText(text, Math.min(Math.max(x, frame.left + reach), frame.width - reach), top + 6);
  }
}
