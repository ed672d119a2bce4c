// The scales of a line chart: one x for all lines, room around the values, decades that can be read.

import { measured, power } from "../data/format.js";

/** @typedef {import("./line.js").Line} Line */

/** uPlot, a classic script, has only a global name. */
export const maker = () => /** @type {typeof import("uplot")} */ (Reflect.get(globalThis, "uPlot"));

/** The lines' series on one x: steps in the middle of their own width. @param {Line[]} lines @param {boolean} log */
export function joined(lines, log) {
  /** @param {import("../data/api.js").Measured[]} values */
  const finite = (values) => values.map((value) => (typeof value === "number" && (!log || value > 0) ? value : null));
  const tables = lines.map(({ series }) => [
    series.steps.map((step, index) => (step + series.last_steps[index] + 1) / 2),
    finite(series.min),
    finite(series.max),
    finite(series.mean),
  ]);
  if (tables.length === 1) return tables[0];
  return maker().join(
    /** @type {any} */ (tables),
    tables.map((table) => table.map(() => 2)),
  );
}

/** @param {number | null} low @param {number | null} high @param {boolean} log @param {number[]} limits @returns {[number, number]} */
export function padded(low, high, log, limits) {
  if (low === null || high === null) return [0.1, 1];
  [low, high] = [Math.min(low, ...limits), Math.max(high, ...limits)];
  if (log) return low === high ? [low / 3, high * 3] : [low / 1.3, high * 1.3];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** An axis of whole decades, at most about four; within one decade of its 1, 2 and 5. @type {Pick<import("uplot").Axis, "splits" | "values" | "filter">} */
export const logarithmic = {
  splits: (_plot, _axis, low, high) => {
    const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
    if (last <= first)
      return [-1, 0, 1]
        .flatMap((decade) => [1, 2, 5].map((unit) => unit * 10 ** (Math.floor(Math.log10(low)) + decade + 1)))
        .filter((value) => value >= low && value <= high);
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

/** @param {number} value */
const isDecade = (value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6;
