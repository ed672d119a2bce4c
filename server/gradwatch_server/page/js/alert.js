// One alert: what, where, since when, why, what to do, and whom it was told.

import { blamed, heldToTheEnd } from "./alerts.js";
import * as api from "./api.js";
import { el, fill } from "./dom.js";
import { ago, count, measured, moment } from "./format.js";

/** @typedef {import("./api.js").Alert} Alert */

/** @param {import("./view.js").View} view */
export function alertPanel(view) {
  const box = el("article", { class: "card pad alert-panel", hidden: true, "aria-label": "Alert" });
  let shown = "";
  return {
    box,
    /** @param {Alert | undefined} alert */
    async show(alert) {
      box.hidden = !alert;
      const key = alert ? JSON.stringify(alert) : "";
      if (!alert || key === shown) return;
      shown = key;
      const told = el("div", { class: "told" });
      fill(
        box,
        el(
          "header",
          null,
          el("span", { class: `chip ${alert.severity}` }, alert.severity),
          el("h2", null, alert.rule),
          el("span", { class: "soft" }, heldToTheEnd(alert) ? "held to the end" : alert.state),
          el(
            "button",
            {
              type: "button",
              class: "close",
              "aria-label": "Close the alert",
              onclick: () => view.set({ alert: null }),
            },
            "×",
          ),
        ),
        el(
          "div",
          { class: "alert-body" },
          el(
            "div",
            null,
            el("p", { class: "lead" }, alert.summary),
            steps(alert, view),
            el(
              "dl",
              { class: "advice-text" },
              el("dt", null, "Likely cause"),
              el("dd", null, alert.cause),
              el("dt", null, "What to do"),
              el("dd", null, alert.remedy),
            ),
            evidence(alert),
            told,
          ),
          el(
            "div",
            { class: "blamed-part" },
            blamed(alert, (name) => view.set({ parameter: name })),
          ),
        ),
      );
      const deliveries = await api.deliveries(alert.id).catch(() => []);
      fill(
        told,
        deliveries.length
          ? delivered(deliveries)
          : el("p", { class: "soft" }, "Delivered to no one: no receiver is configured."),
      );
    },
  };
}

/** @param {Alert} alert @param {import("./view.js").View} view */
function steps(alert, view) {
  const end = alert.resolved_step ?? view.now.end;
  const room = Math.max(20, end - alert.first_step);
  const look = () => view.look(alert.first_step - room, Math.min(end, alert.first_step + 3 * room) + room);
  return el(
    "p",
    { class: "facts" },
    el("span", null, "began at step ", el("b", null, count(alert.first_step))),
    alert.fired_step !== null && el("span", null, "fired at ", el("b", null, count(alert.fired_step))),
    alert.resolved_step !== null &&
      el(
        "span",
        null,
        "ended at ",
        el("b", null, count(alert.resolved_step)),
        alert.resolution ? `: ${alert.resolution}` : "",
      ),
    el("time", { title: moment(alert.first_at) }, ago(alert.first_at)),
    el("button", { type: "button", onclick: look }, "Look at these steps"),
  );
}

/** @param {Alert} alert */
function evidence(alert) {
  const listed = Object.entries(alert.evidence);
  if (!listed.length) return null;
  return el(
    "dl",
    { class: "evidence" },
    listed.flatMap(([name, value]) => [
      el("dt", null, name.replaceAll("_", " ")),
      el("dd", { class: "mono" }, measured(value)),
    ]),
  );
}

/** @param {api.Delivery[]} deliveries */
function delivered(deliveries) {
  return el(
    "ul",
    { class: "deliveries" },
    deliveries.map((delivery) => {
      const last = delivery.attempts.at(-1);
      const tries = `${delivery.attempts.length} ${delivery.attempts.length === 1 ? "attempt" : "attempts"}`;
      const tone = { delivered: "good", dead: "critical" }[delivery.state] ?? "warning";
      const answer = last ? last.error || `HTTP ${last.status}` : "not tried yet";
      return el(
        "li",
        null,
        el("span", { class: `chip ${tone}` }, delivery.state),
        el("span", null, `${delivery.transition} to `, el("b", null, delivery.receiver)),
        el(
          "span",
          { class: "soft" },
          `${tries} · ${answer} · ${moment(delivery.delivered_at ?? last?.at ?? delivery.created_at)}`,
        ),
      );
    }),
  );
}
