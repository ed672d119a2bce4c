// The values of the charts as a table, for screen readers and for copying. It is filled only while it is open.

import { bucketAt } from "../data/tile.js";
import { count, measured } from "../data/format.js";
import { rangeChanged } from "../data/viewport.js";
import { el, fill, scrollable, tableHead } from "../dom/elements.js";

/** @typedef {import("../data/api.js").Buckets} Buckets */

const MOST_ROWS = 100;
const SETTLE_MS = 300;
const TITLE = "Charts as a table";

/** @param {import("../data/viewport.js").Viewport} viewport */
export function chartTable(viewport) {
  /** By scalar. @type {Map<string, Buckets>} */
  let series = new Map();
  let timer = 0;
  const content = scrollable(TITLE);
  const draw = () => {
    if (box.open) fill(content, table(series, viewport.state));
  };
  const schedule = () => {
    clearTimeout(timer);
    timer = window.setTimeout(draw, SETTLE_MS);
  };
  const box = el("details", { class: "values-table", ontoggle: draw }, el("summary", null, TITLE), content);
  viewport.subscribe((state, before) => rangeChanged(state, before) && schedule());
  return {
    box,
    /** @param {Map<string, Buckets>} shown by scalar */
    show(shown) {
      series = shown;
      schedule();
    },
  };
}

/** @param {Map<string, Buckets>} series @param {{from: number, to: number}} range */
function table(series, { from, to }) {
  const longest = [...series.values()].sort((a, b) => b.steps.length - a.steps.length)[0];
  const lastSteps = new Map(longest?.steps.map((step, index) => [step, longest.last_steps[index]]));
  const steps = (longest?.steps ?? []).filter((step) => step >= from && step < to);
  const stride = Math.ceil(steps.length / MOST_ROWS) || 1;
  const points = `${count(steps.length)} points in view`;
  const rows = steps
    .filter((_, index) => index % stride === 0)
    .map((step) =>
      el(
        "tr",
        null,
        el("th", { scope: "row" }, range(step, lastSteps.get(step) ?? step)),
        [...series.values()].map((buckets) => el("td", { class: "mono" }, valueAt(buckets, step))),
      ),
    );
  return el(
    "table",
    null,
    el("caption", { class: "soft" }, stride > 1 ? `every ${stride}th of ${points}` : points),
    tableHead(["Steps", ...series.keys()]),
    el("tbody", null, rows),
  );
}

/** @param {number} first @param {number} last */
const range = (first, last) => (first === last ? count(first) : `${count(first)} to ${count(last)}`);

/** Return the value of the bucket that contains a step, as text. @param {Buckets} buckets @param {number} step */
function valueAt(buckets, step) {
  const index = bucketAt(buckets.steps, step);
  return index < 0 || buckets.last_steps[index] < step ? "" : measured(buckets.last[index]);
}
