// Actions on an alert, with an admin token: acknowledge it, or mute it for a while with a silence.

import * as api from "../data/api.js";
import { moment } from "../data/format.js";
import { literalPattern } from "../data/patterns.js";
import { button, el, fill, select } from "../dom/elements.js";

/** @typedef {import("../data/api.js").Alert} Alert */

const AUTHOR = "gradwatch.author"; // key of the local storage
const HOUR = 3600;
/** @type {[label: string, seconds: number][]} */
const DURATIONS = [
  ["1 hour", HOUR],
  ["8 hours", 8 * HOUR],
  ["1 day", 24 * HOUR],
  ["1 week", 168 * HOUR],
];
/**
 * The scopes of a new silence that are offered for an alert.
 * @type {[label: string, scope: (alert: Alert, run: api.Run) => Partial<api.Silence>][]}
 */
const SCOPES = [
  ["this rule in this run", (alert) => ({ run: alert.run, rule: alert.rule })],
  ["every rule in this run", (alert) => ({ run: alert.run })],
  [
    "this rule in every run of the project",
    (alert, run) => ({ project: literalPattern(run.project), rule: alert.rule }),
  ],
];

/** The buttons and the form for one alert. */
export class AlertActions {
  /**
   * @param {Alert} alert @param {api.Run} run @param {() => Promise<unknown>} changed is called after an action
   */
  constructor(alert, run, changed) {
    this.alert = alert;
    this.run = run;
    this.changed = changed;
    this.author = el("input", { maxlength: 200, required: true, value: localStorage.getItem(AUTHOR) ?? "" });
    this.acknowledge = button("Acknowledge", () => this.perform(() => api.acknowledge(alert.id, this.authorName)));
    const withdraw = () => this.send(() => api.withdrawAcknowledgement(alert.id));
    this.withdraw = button("Withdraw the acknowledgement", withdraw);
    this.form = new SilenceForm(() => this.perform(() => this.silence()));
    this.error = el("p", { class: "wrong", role: "alert" });
    const author = el("label", null, "Your name", this.author);
    const buttons = el("div", { class: "acting" }, author, this.acknowledge, this.withdraw);
    this.box = el("div", { class: "actions" }, buttons, this.form.box, this.error);
  }

  get authorName() {
    return this.author.value.trim();
  }

  /** @param {Alert} alert as it is now */
  show(alert) {
    const firing = alert.state === "firing";
    this.box.hidden = !api.mayChange() || alert.state === "resolved";
    this.withdraw.hidden = !firing || alert.acknowledged_at === null;
    this.acknowledge.hidden = !firing || alert.acknowledged_at !== null;
  }

  silence() {
    const everything = { project: api.session.project ?? "*", run: "*", rule: "*" };
    const scope = this.form.scope(this.alert, this.run);
    return api.addSilence({ ...everything, ...scope, author: this.authorName, ...this.form.values() });
  }

  /** Perform an action that needs the name of its author. @param {() => Promise<unknown>} action */
  async perform(action) {
    fill(this.error);
    if (!this.author.reportValidity()) return;
    localStorage.setItem(AUTHOR, this.authorName);
    await this.send(action);
  }

  /** Perform an action; show the error if the server refuses it. @param {() => Promise<unknown>} action */
  async send(action) {
    fill(this.error);
    try {
      await action();
      this.form.box.open = false;
      await this.changed();
    } catch (error) {
      fill(this.error, error instanceof Error ? error.message : String(error));
    }
  }
}

/** The form for a new silence, closed at first. */
class SilenceForm {
  /** @param {() => void} submitted */
  constructor(submitted) {
    this.what = select(SCOPES.map(([label]) => [label, label]));
    this.duration = select(DURATIONS.map(([label]) => [label, label]));
    this.until = el("input", { type: "datetime-local", required: true });
    this.comment = el("input", { maxlength: 2000 });
    this.duration.addEventListener("input", () => this.setUntil());
    this.setUntil();
    /** @param {Event} event */
    const onsubmit = (event) => {
      event.preventDefault();
      submitted();
    };
    const form = el(
      "form",
      { onsubmit },
      el("label", null, "What", this.what),
      el("label", null, "For", this.duration),
      el("label", null, "Until", this.until),
      el("label", null, "Comment", this.comment),
      el("button", { class: "action" }, "Silence"),
    );
    this.box = el("details", { class: "silence-form" }, el("summary", null, "Silence …"), form);
  }

  /** Set the end to the chosen duration from now. */
  setUntil() {
    const [, seconds] = DURATIONS[this.duration.selectedIndex];
    this.until.value = inputTime(Date.now() / 1000 + seconds);
  }

  /** @param {Alert} alert @param {api.Run} run */
  scope(alert, run) {
    const [, scope] = SCOPES[this.what.selectedIndex];
    return scope(alert, run);
  }

  values() {
    return { comment: this.comment.value.trim(), ends_at: new Date(this.until.value).getTime() / 1000 };
  }
}

/** Return a moment in the form that an input of type datetime-local takes. @param {number} at Unix seconds */
const inputTime = (at) => moment(at).replace(" ", "T").slice(0, 16);
