// Alerts: of all runs, or beside one run's map.

import { silenceList } from "../controls/actions.js";
import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";
import { ago, count, measured, moment } from "../data/format.js";
import { kept } from "./runs.js";

/** @typedef {import("../data/api.js").Alert} Alert */

const FEW = 100;
const MOST = 1000;
const ORDER = { firing: 0, pending: 1, resolved: 2 };

/** Firing first, critical before warning, the newest before the older. @param {Alert[]} alerts */
export function sorted(alerts) {
  return [...alerts].sort(
    (a, b) => ORDER[a.state] - ORDER[b.state] || a.severity.localeCompare(b.severity) || b.first_at - a.first_at,
  );
}

/** @param {HTMLElement} main @param {import("../data/live.js").Live} live */
export async function alertsView(main, live) {
  document.title = "Alerts · gradwatch";
  const list = el("ul", { class: "alerts wide" });
  const held = el("section", { class: "card pad", hidden: true });
  const none = el("p", { class: "empty" }, "Nothing is wrong, and nothing was.");
  let shownSilences = "";
  let wanted = FEW;
  const more = () => {
    wanted = Math.min(MOST, wanted + FEW);
    return load();
  };
  const older = el("button", { type: "button", hidden: true, onclick: () => more() }, "Older alerts");
  /** @returns {Promise<void>} */
  const load = async () => {
    const [firing, pending, over, runs, silences] = await Promise.all([
      api.alerts({ state: "firing" }),
      api.alerts({ state: "pending" }),
      api.alerts({ state: "resolved", limit: wanted }),
      api.runs(),
      api.silences(),
    ]);
    const alerts = [...firing, ...pending, ...over];
    older.hidden = over.length < wanted || wanted >= MOST;
    const names = new Map(runs.map((run) => [run.id, `${run.project} / ${run.name}`]));
    fill(
      list,
      sorted(alerts).map((alert) => item(alert, names.get(alert.run) ?? alert.run)),
    );
    none.hidden = alerts.length > 0;
    held.hidden = silences.length === 0;
    const key = JSON.stringify(silences);
    if (key !== shownSilences) fill(held, el("h2", null, "Silences"), silenceList(silences, load, names));
    shownSilences = key;
  };
  await load();
  fill(main, el("div", { class: "head" }, el("h1", null, "Alerts")), held, list, older, none);
  return { close: kept(live, load) };
}

/** Whether an alert still held when it ended: the run ended first. @param {Alert} alert */
export const heldToTheEnd = (alert) =>
  alert.state === "resolved" && (alert.resolution ?? "").startsWith("the run has ended");

/** One alert in a list, a link to it on its run's map. @param {Alert} alert @param {string} [run] @param {boolean} [current] */
export function item(alert, run, current = false) {
  const over = alert.state === "resolved" && !heldToTheEnd(alert);
  const steps =
    alert.resolved_step === null
      ? `since step ${count(alert.first_step)}`
      : `steps ${count(alert.first_step)} to ${count(alert.resolved_step)}`;
  return el(
    "li",
    { class: `alert ${alert.severity} ${heldToTheEnd(alert) ? "held" : alert.state}` },
    el(
      "a",
      { href: `/runs/${alert.run}?alert=${alert.id}`, "aria-current": current && "true" },
      el(
        "span",
        { class: "row" },
        el("span", { class: `chip ${over ? "" : alert.severity}` }, alert.rule),
        el("span", { class: "soft" }, `${heldToTheEnd(alert) ? "held to the end" : alert.state} · ${steps}`),
        alert.muted !== null && el("span", { class: "chip" }, "not told"),
        alert.acknowledged_by !== null && el("span", { class: "soft" }, `acknowledged by ${alert.acknowledged_by}`),
        el("time", { class: "soft", title: moment(alert.first_at) }, ago(alert.first_at)),
      ),
      el("span", { class: "summary" }, alert.summary),
      run && el("span", { class: "soft" }, run),
    ),
  );
}

/** The parameters that an alert blames, as a table. @param {Alert} alert @param {(name: string) => void} choose */
export function blamed(alert, choose) {
  const rows = alert.parameters.map((each) =>
    el(
      "tr",
      null,
      el("th", { scope: "row" }, el("button", { class: "plain mono", onclick: () => choose(each.name) }, each.name)),
      el("td", null, measured(each.value)),
      el("td", null, each.limit === "Infinity" ? "finite" : measured(each.limit)),
    ),
  );
  const more = alert.parameters_left_out
    ? el("p", { class: "soft" }, `and ${count(alert.parameters_left_out)} more`)
    : null;
  const head = el(
    "thead",
    null,
    el(
      "tr",
      null,
      ["Parameter", "Value", "Limit"].map((name) => el("th", { scope: "col" }, name)),
    ),
  );
  return rows.length
    ? [
        el(
          "div",
          { class: "scroll", tabindex: 0, role: "region", "aria-label": "Blamed parameters" },
          el("table", { class: "blamed" }, head, el("tbody", null, rows)),
        ),
        more,
      ]
    : [];
}
