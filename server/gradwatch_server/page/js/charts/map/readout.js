// The step, the parameter and the value under the crosshair, as text.

import { count, measured, stepRange } from "../../data/format.js";
import { nearestBucket, orNull, UNSTEPPED } from "../../data/tile.js";
import { el, fill } from "../../dom/elements.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */

/**
 * Return the value of a cell as text: one value, or the range of a bucket of several samples.
 * @param {Tile} tile @param {number} bucket @param {number} row
 */
export function cellText(tile, bucket, row) {
  const cell = bucket * tile.rows + row;
  if (tile.last[cell] === UNSTEPPED) return "a gradient, but no optimizer steps it";
  const [min, max, last] = [tile.min[cell], tile.max[cell], tile.last[cell]].map(orNull);
  if (tile.steps[bucket] === tile.lastSteps[bucket] || max === null) return measured(last);
  const range = min === max ? measured(max) : `${measured(min)} to ${measured(max)}`;
  const nonfinite = tile.nonfinite[cell];
  return nonfinite ? `${range}, ${count(nonfinite)} not finite` : range;
}

/** @returns {{element: HTMLElement, show: (tile: Tile | null, step: number | null, row: number) => void}} */
export function readout() {
  const element = el("p", { class: "readout", role: "status", "aria-live": "polite" });
  let shown = "";
  return {
    element,
    show(tile, step, row) {
      const texts = tile && step !== null ? cellTexts(tile, step, row) : [];
      // A screen reader reads the text aloud whenever it is set: set it only if it has changed.
      if (texts.join("\n") === shown) return;
      shown = texts.join("\n");
      const [steps, name, value] = texts;
      fill(
        element,
        steps && el("span", null, steps),
        name && el("b", { class: "mono" }, name),
        value && el("strong", null, value),
      );
    },
  };
}

/**
 * Return the steps, the name and the value of the cell at a step, as far as there are any.
 * @param {Tile} tile @param {number} step @param {number} row
 */
function cellTexts(tile, step, row) {
  const bucket = nearestBucket(tile, step);
  if (bucket < 0) return [];
  const steps = stepRange(tile.steps[bucket], tile.lastSteps[bucket]);
  const name = tile.parameters[row];
  return name ? [steps, name, cellText(tile, bucket, row)] : [steps];
}
