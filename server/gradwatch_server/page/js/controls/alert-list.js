// Alerts as entries of a list, each a link to its run's page.

import { endedWithRun, recovered, stateText } from "../data/alerts.js";
import { ago, count, moment, stepRange } from "../data/format.js";
import { el } from "../dom/elements.js";

/**
 * @param {import("../data/api.js").Alert} alert @param {string} [run] name of its run
 * @param {boolean} [open] whether its details are shown
 */
export function alertEntry(alert, run, open = false) {
  const steps =
    alert.resolved_step === null
      ? `since step ${count(alert.first_step)}`
      : stepRange(alert.first_step, alert.resolved_step);
  return el(
    "li",
    { class: `alert ${alert.severity} ${endedWithRun(alert) ? "ended-with-run" : alert.state}` },
    el(
      "a",
      { href: `/runs/${alert.run}?alert=${alert.id}`, "aria-current": open && "true" },
      el(
        "span",
        { class: "row" },
        el("span", { class: `chip ${recovered(alert) ? "" : alert.severity}` }, alert.rule),
        el("span", { class: "soft" }, `${stateText(alert)} · ${steps}`),
        alert.muted !== null && el("span", { class: "chip" }, "muted"),
        alert.acknowledged_by !== null && el("span", { class: "soft" }, `acknowledged by ${alert.acknowledged_by}`),
        el("time", { class: "soft", title: moment(alert.first_at) }, ago(alert.first_at)),
      ),
      el("span", { class: "summary" }, alert.summary),
      run && el("span", { class: "soft" }, run),
    ),
  );
}
