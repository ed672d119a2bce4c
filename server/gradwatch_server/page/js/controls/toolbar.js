// What is drawn and how much of it: the controls above the map.

import { el } from "../dom/elements.js";
import { count } from "../data/format.js";

/** @typedef {import("../data/viewport.js").View} View */

/** @type {[string, string][]} */
const STATISTICS = [
  ["ratio", "Gradient / weight ratio"],
  ["grad_norm", "Gradient norm"],
  ["clipped_grad_norm", "Gradient norm after clipping"],
  ["weight_norm", "Weight norm"],
  ["max_unit_ratio", "Largest unit ratio"],
  ["update_norm", "Update norm"],
  ["zero_unit_share", "Share of zero units"],
  ["clipped_unit_share", "Share of clipped units"],
  ["nonfinite_count", "Non-finite elements"],
];
/** @type {[string, string][]} */
const CELLS = [
  ["max", "largest"],
  ["min", "smallest"],
  ["last", "newest"],
];

/** @param {View} view */
export function controls(view) {
  const statistic = choice("Statistic", STATISTICS, view.now.statistic, (value) => view.set({ statistic: value }));
  const cell = choice("Of each cell", CELLS, view.now.cell, (value) =>
    view.set({ cell: /** @type {"max"} */ (value) }),
  );
  const range = el("output", { class: "range soft" });
  const show = () => {
    const { from, to, end } = view.now;
    const [first, last] = [Math.max(0, Math.floor(from)), Math.min(end, Math.ceil(to)) - 1];
    range.textContent =
      from <= 0 && to >= end
        ? "whole run"
        : first >= last
          ? `step ${count(first)}`
          : `steps ${count(first)} to ${count(last)}`;
    statistic.value = view.now.statistic;
    cell.value = view.now.cell;
  };
  view.subscribe(show);
  show();
  const centre = () => {
    const { from, to, step } = view.now;
    return step !== null && step >= from && step < to ? step + 0.5 : (from + to) / 2;
  };
  return el(
    "div",
    { class: "controls" },
    el("label", null, el("span", { class: "hidden-text" }, "Statistic"), statistic),
    el("label", null, el("span", { class: "soft" }, "cell shows"), cell),
    el(
      "div",
      { class: "zoom", role: "group", "aria-label": "Zoom" },
      range,
      button("◀", "Earlier steps", () => view.pan(-0.5)),
      button("▶", "Later steps", () => view.pan(0.5)),
      button("+", "Zoom in", () => view.zoom(0.5, centre())),
      button("−", "Zoom out", () => view.zoom(2, centre())),
      button("All", "All steps", () => view.all()),
    ),
  );
}

/** @param {string} text @param {string} label @param {() => void} press */
const button = (text, label, press) =>
  el("button", { type: "button", "aria-label": label, title: label, onclick: press }, text);

/** @param {string} label @param {[string, string][]} options @param {string} value @param {(value: string) => void} chosen */
function choice(label, options, value, chosen) {
  const made = el(
    "select",
    { "aria-label": label, oninput: () => chosen(made.value) },
    options.map(([name, text]) => el("option", { value: name }, text)),
  );
  made.value = value;
  return made;
}
