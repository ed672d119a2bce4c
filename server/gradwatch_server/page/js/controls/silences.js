// The silences in force: their list, and the test whether one covers an alert.

import * as api from "../data/api.js";
import { moment } from "../data/format.js";
import { matches } from "../data/patterns.js";
import { button, el } from "../dom/elements.js";

/** @typedef {import("../data/api.js").Silence} Silence */

/**
 * Return whether a silence covers an alert.
 * @param {Silence} silence @param {api.Alert} alert @param {string} project of its run
 */
export const covers = (silence, alert, project) =>
  matches(silence.project, project) && matches(silence.run, alert.run) && matches(silence.rule, alert.rule);

/**
 * Make the list of silences, each with the button that ends it.
 * @param {Silence[]} silences @param {() => Promise<unknown>} changed is called after one was ended
 * @param {Map<string, string>} runNames by id
 */
export function silenceList(silences, changed, runNames) {
  return el(
    "ul",
    { class: "silences" },
    silences.map((silence) =>
      el(
        "li",
        null,
        el("span", { class: "chip" }, "silenced"),
        el("span", null, "by ", el("b", null, silence.author), ` until ${moment(silence.ends_at)}`),
        silence.comment && el("span", null, `“${silence.comment}”`),
        el("span", { class: "soft" }, scopeText(silence, runNames)),
        api.mayChange() && endButton(silence, changed),
      ),
    ),
  );
}

/** @param {Silence} silence @param {() => Promise<unknown>} changed */
function endButton({ id }, changed) {
  const end = button("End the silence", async () => {
    end.disabled = true;
    await api.endSilence(id).catch(() => undefined);
    await changed();
  });
  return end;
}

/** Describe the alerts that a silence covers. @param {Silence} silence @param {Map<string, string>} runNames */
function scopeText({ project, run, rule }, runNames) {
  const patterns = Object.entries({ project, run: runNames.get(run) ?? run, rule });
  const given = patterns.filter(([, pattern]) => pattern !== "*");
  return given.length ? given.map((pair) => pair.join(" ")).join(", ") : "every alert";
}
