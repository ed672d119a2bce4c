// The details of one alert: its steps, cause, remedy and evidence, its silences, and its deliveries.

import { stateText } from "../data/alerts.js";
import * as api from "../data/api.js";
import { ago, count, measured, moment } from "../data/format.js";
import { breakable, button, descriptions, el, fill, scrollable, tableHead } from "../dom/elements.js";
import { AlertActions } from "./actions.js";
import { deliveryList } from "./deliveries.js";
import { covers, silenceList } from "./silences.js";

/** @typedef {import("../data/api.js").Alert} Alert */
/** @typedef {import("../data/viewport.js").Viewport} Viewport */

const RELOAD_MS = 2000;
const CONTEXT_STEPS = 20;

export class AlertPanel {
  /**
   * @param {Viewport} viewport @param {() => api.Run} run returns the run as it is now
   * @param {() => Promise<unknown>} reloadAlerts
   */
  constructor(viewport, run, reloadAlerts) {
    this.viewport = viewport;
    this.run = run;
    this.reloadAlerts = reloadAlerts;
    /** @type {Alert | null} */
    this.alert = null;
    /** @type {AlertActions | null} */
    this.actions = null;
    /** The drawn documents as JSON. The same ones are not drawn again, which would take the focus away. */
    this.drawn = { alert: "", notifications: "" };
    this.timer = 0;
    this.content = el("div");
    this.silences = el("div");
    this.notifications = el("div", { class: "notifications" });
    this.box = el("article", { class: "card pad alert-panel", hidden: true, "aria-label": "Alert" });
  }

  /** Show an alert; close the panel if there is none. @param {Alert | undefined} alert */
  show(alert) {
    this.box.hidden = !alert;
    if (!alert) {
      this.close();
      return;
    }
    if (alert.id !== this.alert?.id) {
      this.actions = new AlertActions(alert, this.run(), () => this.reload());
      this.drawn.notifications = "";
      fill(this.notifications);
      fill(this.silences);
      fill(this.box, this.content, this.actions.box, this.silences, this.notifications);
    }
    this.alert = alert;
    this.actions?.show(alert);
    this.draw(alert);
    this.loadNotifications(alert);
  }

  /** @param {Alert} alert */
  draw(alert) {
    const key = JSON.stringify(alert);
    if (key === this.drawn.alert) return;
    this.drawn.alert = key;
    this.box.classList.toggle("warning", alert.severity === "warning");
    const close = button("×", () => this.viewport.set({ alert: null }), {
      class: "close",
      "aria-label": "Close the alert",
    });
    const blamed = blamedParameters(alert, (parameter) => this.viewport.set({ parameter }));
    fill(
      this.content,
      el("header", null, headline(alert), close),
      el(
        "div",
        { class: "alert-body" },
        explanation(alert, this.viewport),
        el("div", { class: "blamed-part" }, blamed),
      ),
    );
  }

  /**
   * Load the deliveries of the alert and the silences that cover it; again while a delivery is due.
   * @param {Alert} alert
   */
  async loadNotifications(alert) {
    clearTimeout(this.timer);
    const [deliveries, silences] = await Promise.all([
      api.deliveries(alert.id).catch(() => []),
      api.silences().catch(() => []),
    ]);
    if (this.alert?.id !== alert.id) return;
    const covering = silences.filter((silence) => covers(silence, alert, this.run().project));
    const key = JSON.stringify([deliveries, covering]);
    if (key !== this.drawn.notifications) {
      this.drawn.notifications = key;
      this.drawNotifications(alert, deliveries, covering);
    }
    if (this.box.isConnected && deliveries.some(({ state }) => state === "due"))
      this.timer = window.setTimeout(() => this.loadNotifications(alert), RELOAD_MS);
  }

  /** @param {Alert} alert @param {api.Delivery[]} deliveries @param {api.Silence[]} silences */
  drawNotifications(alert, deliveries, silences) {
    const nobody = `Nobody was notified${alert.muted === null ? ": no receiver is configured" : ""}.`;
    fill(
      this.notifications,
      deliveries.length
        ? deliveryList(deliveries, () => this.loadNotifications(alert))
        : el("p", { class: "soft" }, nobody),
    );
    const runNames = new Map([[alert.run, this.run().name]]);
    fill(this.silences, silences.length > 0 && silenceList(silences, () => this.reload(), runNames));
  }

  /** Load everything again after a change. */
  async reload() {
    await this.reloadAlerts();
    if (this.alert) await this.loadNotifications(this.alert);
  }

  close() {
    this.alert = null;
    clearTimeout(this.timer);
  }
}

/** @param {Alert} alert */
function headline(alert) {
  const { acknowledged_by: author, flaps } = alert;
  return [
    el("span", { class: `chip ${alert.severity}` }, alert.severity),
    el("h2", null, alert.rule),
    el("span", { class: "soft" }, stateText(alert)),
    author !== null &&
      el("span", { class: "chip good", title: moment(alert.acknowledged_at) }, `acknowledged by ${author}`),
    alert.muted !== null && el("span", { class: "chip" }, `muted: ${alert.muted}`),
    flaps > 0 && el("span", { class: "soft" }, `came back ${flaps === 1 ? "once" : `${flaps} times`}`),
  ];
}

/** @param {Alert} alert @param {Viewport} viewport */
function explanation(alert, viewport) {
  const evidence = Object.entries(alert.evidence).map(
    ([name, value]) => /** @type {const} */ ([name.replaceAll("_", " "), measured(value)]),
  );
  return el(
    "div",
    null,
    el("p", { class: "lead" }, alert.summary),
    stepFacts(alert, viewport),
    descriptions("advice-text", [
      ["Likely cause", alert.cause],
      ["What to do", alert.remedy],
    ]),
    evidence.length > 0 && descriptions("evidence", evidence, "mono"),
  );
}

/**
 * Make the line with the steps at which an alert began, fired and ended, and the button that shows them.
 * @param {Alert} alert @param {Viewport} viewport
 */
function stepFacts(alert, viewport) {
  const { first_step: first, fired_step: fired, resolved_step: resolved, resolution } = alert;
  const look = () => {
    const end = resolved ?? viewport.state.end;
    const context = Math.max(CONTEXT_STEPS, end - first);
    viewport.showRange(first - context, Math.min(end, first + 3 * context) + context);
  };
  /** @param {string} text @param {number} step @param {string} [more] */
  const fact = (text, step, more) => el("span", null, text, el("b", null, count(step)), more);
  return el(
    "p",
    { class: "facts" },
    fact("began at step ", first),
    fired !== null && fact("fired at ", fired),
    resolved !== null && fact("ended at ", resolved, resolution ? `: ${resolution}` : ""),
    el("time", { title: moment(alert.first_at) }, ago(alert.first_at)),
    button("Look at these steps", look),
  );
}

/** Make the table of the blamed parameters. @param {Alert} alert @param {(name: string) => void} choose */
function blamedParameters(alert, choose) {
  if (!alert.parameters.length) return [];
  const rows = alert.parameters.map(({ name, value, limit }) =>
    el(
      "tr",
      null,
      el(
        "th",
        { scope: "row" },
        button(breakable(name), () => choose(name), { class: "plain mono" }),
      ),
      el("td", null, measured(value)),
      el("td", null, limit === "Infinity" ? "finite" : measured(limit)),
    ),
  );
  const table = el("table", { class: "blamed" }, tableHead(["Parameter", "Value", "Limit"]), el("tbody", null, rows));
  const more = alert.parameters_left_out;
  return [scrollable("Blamed parameters", table), more > 0 && el("p", { class: "soft" }, `and ${count(more)} more`)];
}
