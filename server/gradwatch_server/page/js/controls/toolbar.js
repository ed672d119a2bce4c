// The controls above the map: the statistic, the value of each cell, the range of steps.

import { stepRange } from "../data/format.js";
import { isStatistic, STATISTICS } from "../data/statistics.js";
import { button, el, select } from "../dom/elements.js";

/** @typedef {import("../data/viewport.js").Viewport} Viewport */

/** @type {[import("../data/viewport.js").Cell, string][]} */
const CELLS = [
  ["max", "largest"],
  ["min", "smallest"],
  ["last", "newest"],
];

/** @param {Viewport} viewport */
export function toolbar(viewport) {
  const statistic = select(Object.entries(STATISTICS), { "aria-label": "Statistic" });
  const cell = select(CELLS, { "aria-label": "Of each cell" });
  const range = el("output", { class: "range soft" });
  statistic.addEventListener(
    "input",
    () => isStatistic(statistic.value) && viewport.set({ statistic: statistic.value }),
  );
  cell.addEventListener("input", () => viewport.set({ cell: CELLS[cell.selectedIndex][0] }));
  const show = () => {
    statistic.value = viewport.state.statistic;
    cell.value = viewport.state.cell;
    range.textContent = rangeText(viewport.state);
  };
  viewport.subscribe(show);
  show();
  return el(
    "div",
    { class: "controls" },
    el("label", null, el("span", { class: "hidden-text" }, "Statistic"), statistic),
    el("label", null, el("span", { class: "soft" }, "cell shows"), cell),
    el(
      "div",
      { class: "zoom", role: "group", "aria-label": "Zoom" },
      range,
      symbol("◀", "Earlier steps", () => viewport.pan(-0.5)),
      symbol("▶", "Later steps", () => viewport.pan(0.5)),
      symbol("+", "Zoom in", () => viewport.zoom(0.5, viewport.centre)),
      symbol("−", "Zoom out", () => viewport.zoom(2, viewport.centre)),
      symbol("All", "All steps", () => viewport.showAll()),
    ),
  );
}

/** @param {{from: number, to: number, end: number}} state */
function rangeText({ from, to, end }) {
  if (from <= 0 && to >= end) return "whole run";
  return stepRange(Math.max(0, Math.floor(from)), Math.min(end, Math.ceil(to)) - 1);
}

/** Make a button that shows a symbol. @param {string} text @param {string} label @param {() => void} press */
const symbol = (text, label, press) => button(text, press, { "aria-label": label, title: label });
