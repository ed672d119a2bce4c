// Data and scales for a line chart of uPlot: one x for all lines, a margin around the values, readable decades.

import { measured, power } from "../data/format.js";

/** @typedef {import("./line.js").Line} Line */
/** @typedef {import("uplot").Axis} Axis */
/** @typedef {import("uplot").AlignedData} AlignedData */

/** JoinNullMode.Expand of uPlot: lines keep their gaps. */
const EXPAND_NULLS = 2;

/** Return the charts' library. It is a classic script: it has only a global name. */
export function uPlot() {
  const library = Reflect.get(globalThis, "uPlot");
  if (!library) throw new Error("the library for charts was not loaded");
  return /** @type {typeof import("uplot")} */ (library);
}

/**
 * Join the lines on one x, each bucket in the middle of its steps.
 * @param {Line[]} lines @param {boolean} logarithmic @returns {AlignedData}
 */
export function joinLines(lines, logarithmic) {
  /** @param {import("../data/api.js").Measured[]} values */
  const drawable = (values) =>
    values.map((value) => (typeof value === "number" && (!logarithmic || value > 0) ? value : null));
  const tables = lines.map(
    ({ buckets }) =>
      /** @type {AlignedData} */ ([
        buckets.steps.map((step, index) => (step + buckets.last_steps[index] + 1) / 2),
        drawable(buckets.min),
        drawable(buckets.max),
        drawable(buckets.mean),
      ]),
  );
  if (tables.length === 1) return tables[0];
  return uPlot().join(
    tables,
    tables.map((table) => table.map(() => EXPAND_NULLS)),
  );
}

/**
 * Return the ends of the y axis: around the values and the limits, with a margin.
 * @param {number | null} low @param {number | null} high @param {boolean} logarithmic @param {number[]} limits
 * @returns {[number, number]}
 */
export function valueRange(low, high, logarithmic, limits) {
  if (low === null || high === null) return [0.1, 1];
  [low, high] = [Math.min(low, ...limits), Math.max(high, ...limits)];
  if (logarithmic) return low === high ? [low / 3, high * 3] : [low / 1.3, high * 1.3];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
}

/**
 * A logarithmic axis: at most about four whole decades; within one decade 1, 2 and 5.
 * @type {Pick<Axis, "splits" | "values" | "filter">}
 */
export const logarithmicAxis = {
  splits: (_plot, _axis, low, high) => {
    const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
    if (last <= first) return splitsWithinDecade(low, high);
    const stride = Math.ceil((last - first + 1) / 4);
    return Array.from(
      { length: Math.floor((last - first) / stride) + 1 },
      (_, index) => 10 ** (first + index * stride),
    );
  },
  values: (_plot, splits) =>
    splits.map((value) => (isDecade(value) ? power(Math.round(Math.log10(value))) : measured(value))),
  filter: (_plot, splits) => splits,
};

/**
 * Return the indices of the values without a neighbour, which no line joins: they are drawn as dots.
 * @param {import("uplot")} plot @param {number} series
 */
export function lonePoints({ data }, series) {
  const values = data[series];
  /** @param {number} index */
  const isValue = (index) => values[index] !== null && values[index] !== undefined;
  return [...values.keys()].filter((index) => isValue(index) && !isValue(index - 1) && !isValue(index + 1));
}

/** @param {number} low @param {number} high */
const splitsWithinDecade = (low, high) =>
  [-1, 0, 1]
    .flatMap((decade) => [1, 2, 5].map((unit) => unit * 10 ** (Math.floor(Math.log10(low)) + decade + 1)))
    .filter((value) => value >= low && value <= high);

/** @param {number} value */
const isDecade = (value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6;

/**
 * Return whether values span so much that only a logarithm shows them.
 * @param {import("../data/api.js").Buckets[]} all
 */
export function needLogarithm(all) {
  const values = all.flatMap(({ mean }) => mean).filter((value) => typeof value === "number");
  const ordered = values.sort((a, b) => a - b);
  return ordered.length > 1 && ordered[0] > 0 && ordered[ordered.length - 1] > 1e3 * ordered[ordered.length >> 1];
}
