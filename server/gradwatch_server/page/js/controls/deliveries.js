// The deliveries of an alert to its receivers, with every attempt.

import * as api from "../data/api.js";
import { countOf, moment } from "../data/format.js";
import { button, el } from "../dom/elements.js";

/** @typedef {api.Delivery["attempts"][number]} Attempt */

/** @type {Partial<Record<string, [tone: string, text: string]>>} */
const STATES = { delivered: ["good", "delivered"], dead: ["critical", "given up"] };

/** @param {api.Delivery[]} deliveries @param {() => Promise<unknown>} changed is called when one is sent again */
export function deliveryList(deliveries, changed) {
  return el(
    "ul",
    { class: "deliveries" },
    deliveries.map((delivery) => entry(delivery, changed)),
  );
}

/** @param {api.Delivery} delivery @param {() => Promise<unknown>} changed */
function entry(delivery, changed) {
  const { attempts, state } = delivery;
  const [tone, text] = STATES[state] ?? ["warning", state];
  const when = moment(delivery.delivered_at ?? attempts.at(-1)?.at ?? delivery.created_at);
  return el(
    "li",
    null,
    el("span", { class: `chip ${tone}` }, text),
    el("span", null, `${delivery.transition} to `, el("b", null, delivery.receiver)),
    attempts.length > 0 ? attemptList(attempts, when) : el("span", { class: "soft" }, `not tried yet · ${when}`),
    state === "due" && attempts.length > 0 && el("span", { class: "soft" }, `again ${moment(delivery.due_at)}`),
    api.mayChange() && state !== "due" && replayButton(delivery, changed),
  );
}

/** @param {Attempt[]} attempts @param {string} when */
function attemptList(attempts, when) {
  const last = attempts[attempts.length - 1];
  const entries = attempts.map((attempt) => {
    const text = `${moment(attempt.at)}: ${result(attempt)}, ${Math.round(attempt.seconds * 1000)} ms`;
    return el("li", { value: attempt.number }, text);
  });
  return el(
    "details",
    { class: "attempts" },
    el("summary", null, `${countOf(attempts.length, "attempt")} · ${result(last)} · ${when}`),
    el("ol", null, entries),
  );
}

/** @param {Attempt} attempt */
const result = ({ error, status }) => error || `HTTP ${status}`;

/** @param {api.Delivery} delivery @param {() => Promise<unknown>} changed */
function replayButton({ id }, changed) {
  const replay = button("Send again", async () => {
    replay.disabled = true;
    await api.replay(id).catch(() => undefined);
    await changed();
  });
  return replay;
}
