// A tile of the layer x step map: one statistic of every parameter, in buckets of samples.

import { inView } from "./viewport.js";

/** Value of a cell whose gradient was missing: neither zero nor NaN. Statistics are never negative. */
export const MISSING = -1;
/** Value of a cell whose parameter has a gradient, but no optimizer that would step it. */
export const UNSTEPPED = -2;

const MOST_COLOUR_SAMPLES = 20_000;
const WIDEST_DECADES = 20;
const NARROWEST_DECADES = 3;
const LONGEST_STRIDES = 1.5;

/**
 * @typedef {object} Tile
 * @property {string} statistic
 * @property {string[]} parameters names in the order of depth
 * @property {number[]} steps first step of each bucket
 * @property {number[]} lastSteps last step of each bucket
 * @property {number[]} ends where each bucket ends on the axis, exclusive
 * @property {{from: number, to: number}[]} gaps steps that were not sampled, between samples that usually lie closer
 * @property {number} rows number of parameters
 * @property {Float32Array} max shape (buckets, rows)
 * @property {Float32Array} min shape (buckets, rows)
 * @property {Float32Array} last shape (buckets, rows)
 * @property {Uint16Array} nonfinite number of values that are not finite, shape (buckets, rows)
 */

/** @typedef {{low: number, high: number}} Decades exponents of ten at the ends of a scale */
/** @typedef {{first: number, past: number}} BucketRange indices of buckets, `past` exclusive */

/**
 * Decode the server's bytes, all little-endian: the header's length (uint32), the header (JSON), then the planes max,
 * min, last (float32) and nonfinite (uint16).
 * @param {ArrayBuffer} body @returns {Tile}
 */
export function decodeTile(body) {
  const length = new DataView(body).getUint32(0, true);
  /** @type {Pick<import("./api.js").Schemas["Map"], "statistic" | "parameters" | "steps" | "last_steps">} */
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 4, length)));
  const rows = header.parameters.length;
  const cells = header.steps.length * rows;
  const start = 4 + length;
  /** @param {number} index */
  const plane = (index) => new Float32Array(body, start + 4 * cells * index, cells);
  const usual = usualStride(header.steps, header.last_steps);
  return {
    statistic: header.statistic,
    parameters: header.parameters,
    steps: header.steps,
    lastSteps: header.last_steps,
    ends: bucketEnds(header.steps, header.last_steps, usual),
    gaps: gapsBetween(header.steps, header.last_steps, usual),
    rows,
    max: plane(0),
    min: plane(1),
    last: plane(2),
    nonfinite: new Uint16Array(body, start + 12 * cells, cells),
  };
}

/**
 * Return where each bucket ends: at the start of the next one, for a sample stands for the steps up to the next.
 * @param {number[]} steps @param {number[]} lastSteps @param {number} usual steps from a sample to the next
 */
const bucketEnds = (steps, lastSteps, usual) =>
  steps.map((_, index) => steps[index + 1] ?? lastSteps[index] + usual);

/** Return the usual number of steps from one bucket to the next. @param {number[]} steps @param {number[]} lastSteps */
function usualStride(steps, lastSteps) {
  const strides = steps.slice(1).map((step, index) => step - lastSteps[index]);
  return strides.sort((a, b) => a - b)[strides.length >> 1] ?? 1;
}

/**
 * Return the ranges of steps without a sample, where samples lie much farther apart than usual. `to` is exclusive.
 * @param {number[]} steps @param {number[]} lastSteps @param {number} usual steps from a sample to the next
 */
function gapsBetween(steps, lastSteps, usual) {
  return steps.slice(1).flatMap((to, index) => {
    const from = lastSteps[index] + usual;
    return to - lastSteps[index] > LONGEST_STRIDES * usual ? [{ from, to }] : [];
  });
}

/**
 * Return the index of the last bucket that begins at or before a step; -1 if there is none.
 * @param {number[]} steps @param {number} step
 */
export function bucketAt(steps, step) {
  let [low, high] = [0, steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/**
 * Return the buckets that hold steps of a range.
 * @param {Tile} tile @param {{from: number, to: number}} range @returns {BucketRange}
 */
export function bucketsWithin(tile, { from, to }) {
  const first = tile.lastSteps.findIndex((step) => step >= from);
  return { first: first < 0 ? tile.steps.length : first, past: bucketAt(tile.steps, Math.ceil(to) - 1) + 1 };
}

/**
 * Return the bucket at the crosshair or, unless one is in view, the newest bucket before the right edge; -1: none.
 * @param {Tile} tile @param {{step: number | null, from: number, to: number}} state
 */
export const crosshairBucket = (tile, state) =>
  bucketAt(tile.steps, inView(state) ? Number(state.step) : Math.ceil(state.to) - 1);

/** @param {number} value @returns {number | null} */
export const orNull = (value) => (value <= MISSING ? null : value);

/**
 * Return the whole decades that hold nearly all finite values, at least three of them.
 * @param {Tile} tile @returns {Decades}
 */
export function findDecades(tile) {
  /** @type {number[]} */
  const logs = [];
  const stride = Math.max(1, Math.floor(tile.last.length / MOST_COLOUR_SAMPLES));
  for (let cell = 0; cell < tile.last.length; cell += stride) {
    const value = tile.last[cell];
    if (value > 0 && Number.isFinite(value)) logs.push(Math.log10(value));
  }
  if (!logs.length) return { low: -6, high: 0 };
  logs.sort((a, b) => a - b);
  /** @param {number} share */
  const quantile = (share) => logs[Math.min(logs.length - 1, Math.floor(share * logs.length))];
  const high = Math.ceil(quantile(0.985) + 0.1);
  const low = Math.max(Math.floor(quantile(0.02)), high - WIDEST_DECADES);
  return { low: Math.min(low, high - NARROWEST_DECADES), high };
}
