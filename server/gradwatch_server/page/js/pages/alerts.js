// The alerts of all runs, and the silences in force.

import { alertEntry } from "../controls/alert-list.js";
import { silenceList } from "../controls/silences.js";
import { sortAlerts } from "../data/alerts.js";
import * as api from "../data/api.js";
import { reloadOnChanges } from "../data/live.js";
import { button, el, fill } from "../dom/elements.js";

const MORE = 100;
const MOST = 1000;

/** @param {HTMLElement} main @param {import("../data/navigation.js").PageContext} context */
export async function open(main, { changes }) {
  let wanted = MORE;
  let shownSilences = "";
  const list = el("ul", { class: "alerts wide" });
  const silenced = el("section", { class: "card pad", hidden: true });
  const empty = el("p", { class: "empty" }, "Nothing is wrong, and nothing was.");
  const older = button("Older alerts", () => {
    wanted = Math.min(MOST, wanted + MORE);
    load();
  });
  /** @returns {Promise<void>} */
  const load = async () => {
    const [firing, pending, resolved, runs, silences] = await Promise.all([
      api.alerts({ state: "firing" }),
      api.alerts({ state: "pending" }),
      api.alerts({ state: "resolved", limit: wanted }),
      api.runs(),
      api.silences(),
    ]);
    const runNames = new Map(runs.map(({ id, project, name }) => [id, `${project} / ${name}`]));
    const alerts = sortAlerts([...firing, ...pending, ...resolved]);
    fill(
      list,
      alerts.map((alert) => alertEntry(alert, runNames.get(alert.run) ?? alert.run)),
    );
    older.hidden = resolved.length < wanted || wanted >= MOST;
    empty.hidden = alerts.length > 0;
    silenced.hidden = silences.length === 0;
    const key = JSON.stringify(silences);
    if (key !== shownSilences) fill(silenced, el("h2", null, "Silences"), silenceList(silences, load, runNames));
    shownSilences = key;
  };
  await load();
  fill(main, el("div", { class: "head" }, el("h1", null, "Alerts")), silenced, list, older, empty);
  return { close: reloadOnChanges(changes, load) };
}
