// The health of the server and of its receivers.

import * as api from "../data/api.js";
import { ago, count, countEach } from "../data/format.js";
import { reloadOnChanges } from "../data/live.js";
import { button, el, fill, scrollable, tableHead } from "../dom/elements.js";

const COLUMNS = ["Receiver", "Host", "Signed", "Delivered", "Due", "Given up", "Last delivered", "Last error"];
const NO_RECEIVER =
  "No receiver is configured: alerts are shown here, and nobody is notified. " +
  "Start with --webhook URL, or list receivers in gradwatch.toml.";

/** @param {HTMLElement} main @param {import("../data/navigation.js").PageContext} context */
export async function open(main, { changes }) {
  const numbers = el("dl", { class: "numbers" });
  const receivers = el("div");
  /** @returns {Promise<void>} */
  const load = async () => {
    const server = await api.server();
    fill(
      numbers,
      facts(server).map(([name, value, tone]) =>
        el("div", { class: tone ?? "" }, el("dt", null, name), el("dd", null, value)),
      ),
    );
    fill(
      receivers,
      server.receivers.length ? receiverTable(server.receivers, load) : el("p", { class: "soft" }, NO_RECEIVER),
    );
  };
  await load();
  fill(
    main,
    el("div", { class: "head" }, el("h1", null, "Server")),
    el("section", { class: "card pad" }, el("h2", null, "Health"), numbers),
    el("section", { class: "card pad" }, el("h2", null, "Receivers"), receivers),
  );
  return { close: reloadOnChanges(changes, load) };
}

/** @param {api.Overview} server @returns {[name: string, value: string, tone?: string][]} */
function facts(server) {
  const { queued_batches: queued, queue_capacity: capacity, mean_commit_seconds: commitSeconds } = server;
  const dropped = countEach(server.dropped);
  return [
    ["State", server.ready ? "ready" : "stopping", server.ready ? "good" : "warning"],
    ["Version", server.version],
    ["Database", server.database],
    ["Runs", count(server.runs)],
    ["Samples stored", count(server.samples)],
    ["Values since start", count(server.stored_values)],
    ["Queue", `${count(queued)} of ${count(capacity)}`, queued > capacity / 2 ? "warning" : ""],
    ["Mean commit", commitSeconds === null ? "–" : `${(commitSeconds * 1000).toFixed(1)} ms`],
    ["Repeated batches", count(server.duplicate_batches)],
    ["Dropped by agents", dropped || "nothing", dropped ? "warning" : ""],
  ];
}

/** @param {api.ReceiverHealth[]} receivers @param {() => Promise<void>} changed is called when something was done */
function receiverTable(receivers, changed) {
  const rows = receivers.map((receiver) =>
    el(
      "tr",
      null,
      el("th", { scope: "row" }, receiver.name, standing(receiver, changed)),
      el("td", null, receiver.host || "–"),
      el("td", null, receiver.signed ? "yes" : "no"),
      el("td", null, count(receiver.delivered)),
      el("td", null, receiver.due ? el("span", { class: "chip warning" }, count(receiver.due)) : "0"),
      el("td", { class: "acting" }, deadDeliveries(receiver, changed)),
      el("td", null, receiver.last_delivered_at === null ? "never" : ago(receiver.last_delivered_at)),
      el(
        "td",
        null,
        receiver.last_error === null ? "none" : `${receiver.last_error}, ${ago(receiver.last_error_at ?? 0)}`,
      ),
    ),
  );
  return scrollable("Receivers", el("table", null, tableHead(COLUMNS), el("tbody", null, rows)));
}

/** @param {api.ReceiverHealth} receiver @param {() => Promise<void>} changed */
function standing({ name, configured, disabled }, changed) {
  return [
    !configured && el("span", { class: "soft" }, " (no longer configured)"),
    disabled !== null && el("span", { class: "chip critical", title: disabled }, "disabled"),
    disabled !== null && action("Enable", () => api.enableReceiver(name).finally(changed)),
  ];
}

/** @param {api.ReceiverHealth} receiver @param {() => Promise<void>} changed */
function deadDeliveries({ name, configured, dead }, changed) {
  if (!dead) return ["0"];
  return [
    el("span", { class: "chip critical" }, count(dead)),
    configured && action("Send again", () => api.replayDead(name).finally(changed)),
  ];
}

/**
 * Make a button that changes something; false where the token does not allow it.
 * @param {string} text @param {() => void} press
 */
const action = (text, press) => api.mayChange() && button(text, press);
