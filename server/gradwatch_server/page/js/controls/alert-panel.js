// One alert: what, where, since when, why, what to do, and whom it was told.

import { actions, fits, silenceList } from "./actions.js";
import { blamed, heldToTheEnd } from "../pages/alerts.js";
import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";
import { ago, count, many, measured, moment } from "../data/format.js";

/** @typedef {import("../data/api.js").Alert} Alert */

const AGAIN_MS = 2000;

/** @param {import("../data/viewport.js").View} view @param {() => api.Run} run @param {() => Promise<unknown>} changed */
export function alertPanel(view, run, changed) {
  const content = el("div");
  const silences = el("div");
  const told = el("div", { class: "told" });
  const box = el("article", { class: "card pad alert-panel", hidden: true, "aria-label": "Alert" });
  /** @type {{alert: Alert, acts: ReturnType<typeof actions>} | null} */
  let open = null;
  let [drawn, toldOf, timer] = ["", "", 0];

  /** @param {Alert} alert */
  const draw = (alert) => {
    const key = JSON.stringify(alert);
    if (key === drawn) return;
    drawn = key;
    box.classList.toggle("warning", alert.severity === "warning");
    fill(
      content,
      el(
        "header",
        null,
        el("span", { class: `chip ${alert.severity}` }, alert.severity),
        el("h2", null, alert.rule),
        el("span", { class: "soft" }, heldToTheEnd(alert) ? "held to the end" : alert.state),
        ...standing(alert),
        el(
          "button",
          { type: "button", class: "close", "aria-label": "Close the alert", onclick: () => view.set({ alert: null }) },
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
        ),
        el(
          "div",
          { class: "blamed-part" },
          blamed(alert, (name) => view.set({ parameter: name })),
        ),
      ),
    );
  };
  /** @param {Alert} alert */
  const tell = async (alert) => {
    clearTimeout(timer);
    const [deliveries, held] = await Promise.all([
      api.deliveries(alert.id).catch(() => []),
      api.silences().catch(() => []),
    ]);
    if (open?.alert.id !== alert.id) return;
    const { project } = run();
    const covering = held.filter(
      (each) => fits(each.project, project) && fits(each.run, alert.run) && fits(each.rule, alert.rule),
    );
    const key = JSON.stringify([deliveries, covering]);
    if (key !== toldOf) {
      toldOf = key;
      fill(
        told,
        deliveries.length
          ? delivered(deliveries, () => tell(alert))
          : el("p", { class: "soft" }, alert.muted ? "Told to no one." : "Told to no one: no receiver is configured."),
      );
      fill(silences, covering.length > 0 && silenceList(covering, renew, new Map([[alert.run, run().name]])));
    }
    if (box.isConnected && deliveries.some(({ state }) => state === "due"))
      timer = window.setTimeout(() => tell(alert), AGAIN_MS);
  };
  const renew = async () => {
    await changed();
    if (open) await tell(open.alert);
  };
  return {
    box,
    /** @param {Alert | undefined} alert */
    show(alert) {
      box.hidden = !alert;
      if (!alert) {
        open = null;
        clearTimeout(timer);
        return;
      }
      if (open?.alert.id !== alert.id) {
        const acts = actions(alert, run(), renew);
        open = { alert, acts };
        toldOf = "";
        fill(told);
        fill(silences);
        fill(box, content, acts.box, silences, told);
      }
      open.alert = alert;
      open.acts.show(alert);
      draw(alert);
      tell(alert);
    },
  };
}

/** Who takes care of it, and why nobody is told. @param {Alert} alert */
function standing(alert) {
  return [
    alert.acknowledged_by !== null &&
      el(
        "span",
        { class: "chip good", title: moment(alert.acknowledged_at) },
        `acknowledged by ${alert.acknowledged_by}`,
      ),
    alert.muted !== null && el("span", { class: "chip" }, `not told: ${alert.muted}`),
    alert.flaps > 0 && el("span", { class: "soft" }, `came back ${alert.flaps === 1 ? "once" : `${alert.flaps} times`}`),
  ];
}

/** @param {Alert} alert @param {import("../data/viewport.js").View} view */
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

const TONES = { delivered: "good", dead: "critical" };

/** @param {api.Delivery[]} deliveries @param {() => Promise<unknown>} changed */
function delivered(deliveries, changed) {
  return el(
    "ul",
    { class: "deliveries" },
    deliveries.map((delivery) => {
      const { attempts, state } = delivery;
      const last = attempts.at(-1);
      const again = el("button", { type: "button", onclick: () => replayed() }, "Send again");
      const replayed = async () => {
        again.disabled = true;
        await api.replay(delivery.id).catch(() => undefined);
        await changed();
      };
      const when = moment(delivery.delivered_at ?? last?.at ?? delivery.created_at);
      return el(
        "li",
        null,
        el("span", { class: `chip ${Reflect.get(TONES, state) ?? "warning"}` }, state === "dead" ? "given up" : state),
        el("span", null, `${delivery.transition} to `, el("b", null, delivery.receiver)),
        attempts.length === 0
          ? el("span", { class: "soft" }, `not tried yet · ${when}`)
          : el(
              "details",
              { class: "attempts" },
              el("summary", null, `${many(attempts.length, "attempt")} · ${last && answered(last)} · ${when}`),
              el(
                "ol",
                null,
                attempts.map((attempt) =>
                  el("li", { value: attempt.number }, `${moment(attempt.at)}: ${answered(attempt)}, ${spent(attempt)}`),
                ),
              ),
            ),
        state === "due" && attempts.length > 0 && el("span", { class: "soft" }, `again ${moment(delivery.due_at)}`),
        api.mayChange() && state !== "due" && again,
      );
    }),
  );
}

/** @param {api.Delivery["attempts"][number]} attempt */
const answered = ({ error, status }) => error || `HTTP ${status}`;

/** @param {api.Delivery["attempts"][number]} attempt */
const spent = ({ seconds }) => `${Math.round(seconds * 1000)} ms`;
