// What can be done about an alert: acknowledge it, or have it not told for a while. Only where the token allows it.

import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";
import { moment } from "../data/format.js";

/** @typedef {import("../data/api.js").Alert} Alert */

const AUTHOR = "gradwatch.author";
const HOUR = 3600;
/** @type {[string, number][]} */
const SPANS = [
  ["1 hour", HOUR],
  ["8 hours", 8 * HOUR],
  ["1 day", 24 * HOUR],
  ["1 week", 168 * HOUR],
];
/** @type {[string, (alert: Alert, run: api.Run) => Partial<api.Silence>][]} */
const WHATS = [
  ["this rule in this run", (alert) => ({ run: alert.run, rule: alert.rule })],
  ["every rule in this run", (alert) => ({ run: alert.run })],
  ["this rule in every run of the project", (alert, run) => ({ project: literal(run.project), rule: alert.rule })],
];

/** A text as a pattern that fits nothing else. @param {string} text */
const literal = (text) => text.replace(/[*?[]/g, "[$&]");

/** Whether a pattern of a silence (`*`, `?`, `[...]`) fits. @param {string} pattern @param {string} text */
export function fits(pattern, text) {
  const parts = pattern.match(/\[[^\]]\]|[^]/g) ?? [];
  const source = parts.map((part) =>
    part === "*" ? "[^]*" : part === "?" ? "[^]" : part.at(part.length >> 1)?.replace(/[\\^$.*+?()[\]{}|/]/, "\\$&"),
  );
  return new RegExp(`^${source.join("")}$`).test(text);
}

/** @param {Alert} alert @param {api.Run} run @param {() => Promise<unknown>} done */
export function actions(alert, run, done) {
  const author = el("input", { maxlength: 200, required: true, value: localStorage.getItem(AUTHOR) ?? "" });
  const what = options(WHATS.map(([name]) => name));
  const span = options(SPANS.map(([name]) => name));
  const until = el("input", { type: "datetime-local", required: true });
  const comment = el("input", { maxlength: 2000 });
  const said = el("p", { class: "wrong", role: "alert" });
  const acknowledge = el("button", { type: "button", onclick: () => act(acknowledged) }, "Acknowledge");
  const withdraw = el("button", { type: "button", onclick: () => act(withdrawn) }, "Withdraw the acknowledgement");
  const later = () => (until.value = local(Date.now() / 1000 + SPANS[span.selectedIndex][1]));
  span.addEventListener("input", later);
  later();

  const withdrawn = () => api.withdraw(alert.id);
  const acknowledged = () => api.acknowledge(alert.id, author.value.trim());
  const silenced = () =>
    api.addSilence({
      project: api.session.project ?? "*",
      ...WHATS[what.selectedIndex][1](alert, run),
      author: author.value.trim(),
      comment: comment.value.trim(),
      ends_at: new Date(until.value).getTime() / 1000,
    });
  /** @param {() => Promise<unknown>} work */
  const act = async (work) => {
    fill(said);
    if (work !== withdrawn && !author.reportValidity()) return;
    localStorage.setItem(AUTHOR, author.value.trim());
    try {
      await work();
      form.open = false;
      await done();
    } catch (error) {
      fill(said, error instanceof Error ? error.message : String(error));
    }
  };
  const form = el(
    "details",
    { class: "silence-form" },
    el("summary", null, "Silence …"),
    el(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          act(silenced);
        },
      },
      el("label", null, "What", what),
      el("label", null, "For", span),
      el("label", null, "Until", until),
      el("label", null, "Comment", comment),
      el("button", { class: "action" }, "Silence"),
    ),
  );
  const box = el(
    "div",
    { class: "actions" },
    el("div", { class: "acting" }, el("label", null, "Your name", author), acknowledge, withdraw),
    form,
    said,
  );
  return {
    box,
    /** @param {Alert} now */
    show(now) {
      box.hidden = !api.mayChange() || now.state === "resolved";
      withdraw.hidden = now.state !== "firing" || now.acknowledged_at === null;
      acknowledge.hidden = now.state !== "firing" || now.acknowledged_at !== null;
    },
  };
}

/**
 * Silences as a list, each with the button that ends it.
 * @param {api.Silence[]} silences @param {() => Promise<unknown>} done @param {Map<string, string>} names of runs by id
 */
export function silenceList(silences, done, names) {
  return el(
    "ul",
    { class: "silences" },
    silences.map((silence) => {
      const button = el("button", { type: "button", onclick: () => ended() }, "End the silence");
      const ended = async () => {
        button.disabled = true;
        await api.endSilence(silence.id).catch(() => undefined);
        await done();
      };
      return el(
        "li",
        null,
        el("span", { class: "chip" }, "silenced"),
        el("span", null, "by ", el("b", null, silence.author), ` until ${moment(silence.ends_at)}`),
        silence.comment && el("span", null, `“${silence.comment}”`),
        el("span", { class: "soft" }, patterns(silence, names)),
        api.mayChange() && button,
      );
    }),
  );
}

/** @param {api.Silence} silence @param {Map<string, string>} names */
function patterns({ project, run, rule }, names) {
  const given = Object.entries({ project, run: names.get(run) ?? run, rule }).filter(([, pattern]) => pattern !== "*");
  return given.length ? given.map((pair) => pair.join(" ")).join(", ") : "every alert";
}

/** @param {string[]} names */
function options(names) {
  return el(
    "select",
    null,
    names.map((name) => el("option", null, name)),
  );
}

/** A moment as an input of type datetime-local takes it. @param {number} at Unix seconds */
const local = (at) => moment(at).replace(" ", "T").slice(0, 16);
