// The server's own health and that of its receivers.

import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";
import { ago, count } from "../data/format.js";
import { kept } from "./runs.js";

/** @param {HTMLElement} main @param {import("../data/live.js").Live} live */
export async function serverView(main, live) {
  document.title = "Server · gradwatch";
  const numbers = el("dl", { class: "numbers" });
  const receivers = el("div");
  /** @returns {Promise<void>} */
  const load = async () => {
    const server = await api.server();
    fill(
      numbers,
      facts(server).flatMap(([name, value, tone]) =>
        el("div", { class: tone ?? "" }, el("dt", null, name), el("dd", null, value)),
      ),
    );
    fill(
      receivers,
      server.receivers.length
        ? table(server.receivers, load)
        : el(
            "p",
            { class: "soft" },
            "No receiver is configured: alerts are shown here and told to no one. Start with --webhook URL, or list receivers in gradwatch.toml.",
          ),
    );
  };
  await load();
  fill(
    main,
    el("div", { class: "head" }, el("h1", null, "Server")),
    el("section", { class: "card pad" }, el("h2", null, "Health"), numbers),
    el("section", { class: "card pad" }, el("h2", null, "Receivers"), receivers),
  );
  return { close: kept(live, load) };
}

/** @param {api.Overview} server @returns {[string, string, string?][]} */
function facts(server) {
  const lost = Object.values(server.dropped).reduce((sum, value) => sum + value, 0);
  const words = Object.entries(server.dropped)
    .filter(([, value]) => value > 0)
    .map(([name, value]) => `${count(value)} ${name}`)
    .join(", ");
  return [
    ["State", server.ready ? "ready" : "stopping", server.ready ? "good" : "warning"],
    ["Version", server.version],
    ["Database", server.database],
    ["Runs", count(server.runs)],
    ["Samples taken in", count(server.samples)],
    ["Values since start", count(server.stored_values)],
    [
      "Queue",
      `${count(server.queued_batches)} of ${count(server.queue_capacity)}`,
      server.queued_batches > server.queue_capacity / 2 ? "warning" : "",
    ],
    ["Mean commit", server.mean_commit_seconds === null ? "–" : `${(server.mean_commit_seconds * 1000).toFixed(1)} ms`],
    ["Repeated batches", count(server.duplicate_batches)],
    ["Dropped by agents", lost ? words : "nothing", lost ? "warning" : ""],
  ];
}

/** @param {api.ReceiverHealth[]} receivers @param {() => Promise<void>} changed */
function table(receivers, changed) {
  /** @param {string} text @param {(name: string) => Promise<unknown>} work @param {string} name */
  const button = (text, work, name) =>
    api.mayChange() && el("button", { type: "button", onclick: () => work(name).finally(changed) }, text);
  const head = ["Receiver", "Host", "Signed", "Delivered", "Due", "Given up", "Last delivered", "Last error"];
  const rows = receivers.map((each) =>
    el(
      "tr",
      null,
      el(
        "th",
        { scope: "row" },
        each.name,
        !each.configured && el("span", { class: "soft" }, " (no longer configured)"),
        each.disabled !== null && el("span", { class: "chip critical", title: each.disabled }, "disabled"),
        each.disabled !== null && button("Enable", api.enable, each.name),
      ),
      el("td", null, each.host || "–"),
      el("td", null, each.signed ? "yes" : "no"),
      el("td", null, count(each.delivered)),
      el("td", null, each.due ? el("span", { class: "chip warning" }, count(each.due)) : "0"),
      el(
        "td",
        { class: "acting" },
        each.dead ? el("span", { class: "chip critical" }, count(each.dead)) : "0",
        each.dead > 0 && each.configured && button("Send again", api.replayDead, each.name),
      ),
      el("td", null, each.last_delivered_at === null ? "never" : ago(each.last_delivered_at)),
      el("td", null, each.last_error === null ? "none" : `${each.last_error}, ${ago(each.last_error_at ?? 0)}`),
    ),
  );
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Receivers" },
    el(
      "table",
      null,
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          head.map((name) => el("th", { scope: "col" }, name)),
        ),
      ),
      el("tbody", null, rows),
    ),
  );
}
