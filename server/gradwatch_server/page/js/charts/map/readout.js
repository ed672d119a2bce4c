// The values under the crosshair, in words.

import { el, fill } from "../../dom/elements.js";
import { count, measured } from "../../data/format.js";
import { nearest } from "../../data/tile.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */

/** What one cell holds, as text. @param {Tile} tile @param {number} bucket @param {number} row */
export function cellText(tile, bucket, row) {
  const cell = bucket * tile.rows + row;
  const [low, high, last] = [tile.min[cell], tile.max[cell], tile.last[cell]].map((value) =>
    value === -1 ? null : value,
  );
  const bad = tile.nonfinite[cell];
  if (tile.steps[bucket] === tile.lastSteps[bucket] || high === null) return measured(last);
  const range = low === high ? measured(high) : `${measured(low)} to ${measured(high)}`;
  return bad ? `${range}, ${count(bad)} not finite` : range;
}

/** @param {Tile} tile @param {number} bucket */
export function bucketText(tile, bucket) {
  const [first, last] = [tile.steps[bucket], tile.lastSteps[bucket]];
  return first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`;
}

/** @returns {{element: HTMLElement, show: (tile: Tile | null, step: number | null, row: number) => void}} */
export function readout() {
  const element = el("p", { class: "readout", role: "status", "aria-live": "polite" });
  let said = "";
  return {
    element,
    show(tile, step, row) {
      const bucket = tile && step !== null ? nearest(tile, step) : -1;
      const text =
        !tile || bucket < 0
          ? ""
          : `${bucketText(tile, bucket)}|${tile.parameters[row] ?? ""}|${tile.parameters[row] ? cellText(tile, bucket, row) : ""}`;
      if (text === said) return;
      said = text;
      const [steps, name, value] = text.split("|");
      fill(
        element,
        steps && el("span", null, steps),
        name && el("b", { class: "mono" }, name),
        value && el("strong", null, value),
      );
    },
  };
}
