// The step, the parameter and the value under the crosshair, as text.

import { count, measured, stepRange } from "../../data/format.js";
import { bucketAt, orNull, UNSTEPPED } from "../../data/tile.js";
import { inView } from "../../data/viewport.js";
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

/** @typedef {Pick<import("../../data/viewport.js").ViewportState, "step" | "from" | "to">} Crosshair */

/** @returns {{element: HTMLElement, show: (tile: Tile | null, crosshair: Crosshair, row: number) => void}} */
export function readout() {
  const element = el("p", { class: "readout", role: "status", "aria-live": "polite" });
  let shown = "";
  return {
    element,
    show(tile, crosshair, row) {
      const texts = tile && inView(crosshair) ? cellTexts(tile, Number(crosshair.step), row) : [];
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
  const bucket = bucketAt(tile.steps, step);
  if (bucket < 0) return [`no sample up to step ${count(step)}`];
  const sampled = stepRange(tile.steps[bucket], tile.lastSteps[bucket]);
  const steps = step <= tile.lastSteps[bucket] ? sampled : `${sampled}, the last sample before step ${count(step)}`;
  const name = tile.parameters[row];
  return name ? [steps, name, cellText(tile, bucket, row)] : [steps];
}
