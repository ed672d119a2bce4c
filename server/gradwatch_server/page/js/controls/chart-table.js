// The charts as a table, for those who read rather than look: made only when it is opened.

import { el, fill } from "../dom/elements.js";
import { count, measured } from "../data/format.js";

const MOST_ROWS = 100;

/** @param {import("../data/viewport.js").View} view */
export function valuesTable(view) {
  /** @type {Map<string, import("../data/api.js").Series>} */
  let shown = new Map();
  const holder = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Charts as a table" });
  const box = el(
    "details",
    { class: "values-table", ontoggle: () => make() },
    el("summary", null, "Charts as a table"),
    holder,
  );
  let due = 0;
  const make = () => {
    if (!box.open) return;
    const { from, to } = view.now;
    const names = [...shown.keys()];
    const longest = [...shown.values()].sort((a, b) => b.steps.length - a.steps.length)[0];
    const steps = (longest?.steps ?? []).filter((step) => step >= from && step < to);
    const stride = Math.ceil(steps.length / MOST_ROWS) || 1;
    const rows = steps
      .filter((_, index) => index % stride === 0)
      .map((step) =>
        el(
          "tr",
          null,
          el("th", { scope: "row" }, count(step)),
          names.map((name) => el("td", { class: "mono" }, at(shown.get(name), step))),
        ),
      );
    const caption =
      stride > 1
        ? `every ${stride}th of ${count(steps.length)} points in view`
        : `${count(steps.length)} points in view`;
    fill(
      holder,
      el(
        "table",
        null,
        el("caption", { class: "soft" }, caption),
        el(
          "thead",
          null,
          el(
            "tr",
            null,
            ["Step", ...names].map((name) => el("th", { scope: "col" }, name)),
          ),
        ),
        el("tbody", null, rows),
      ),
    );
  };
  const soon = () => {
    clearTimeout(due);
    due = window.setTimeout(make, 300);
  };
  view.subscribe((now, before) => (now.from !== before.from || now.to !== before.to) && soon());
  return {
    box,
    /** @param {Map<string, import("../data/api.js").Series>} series */
    show(series) {
      shown = series;
      soon();
    },
  };
}

/** The value of the bucket that a step lies in. @param {import("../data/api.js").Series | undefined} series @param {number} step */
function at(series, step) {
  const index = series ? series.steps.findLastIndex((first) => first <= step) : -1;
  return !series || index < 0 || series.last_steps[index] < step ? "" : measured(series.last[index]);
}
