// One run: its map, and everything that hangs on the same steps.

import * as address from "./address.js";
import { item, sorted } from "./alerts.js";
import * as api from "./api.js";
import { controls } from "./controls.js";
import { el, fill } from "./dom.js";
import { ago, count, moment } from "./format.js";
import { legend } from "./legend.js";
import { LayerMap } from "./map.js";
import { readout } from "./readout.js";
import { stateSign } from "./runs.js";
import { TileSource } from "./source.js";
import { View } from "./view.js";

const STATISTICS = new Set(["ratio", "grad_norm", "clipped_grad_norm", "weight_norm", "max_unit_ratio", "zero_unit_share", "nonfinite_count", "clipped_unit_share", "update_norm"]);

/** @param {HTMLElement} main @param {string} runId @param {import("./live.js").Live} live */
export async function runView(main, runId, live) {
  let run = await api.run(runId);
  const view = new View(looking(run));
  const map = new LayerMap(view);
  const source = new TileSource(runId, view, () => (map.box.clientWidth || main.clientWidth) * (window.devicePixelRatio || 1));
  const key = legend();
  const values = readout();
  const header = el("div", { class: "head" });
  const alerts = el("ul", { class: "alerts" });
  let row = -1;

  const say = () => {
    const chosen = row >= 0 ? row : (source.tile?.parameters.indexOf(view.now.parameter ?? "") ?? -1);
    values.show(source.tile, view.now.step, chosen);
  };
  source.addEventListener("tile", () => {
    if (!source.tile) return;
    map.show(source.tile, source.scale);
    key.show(source.scale, view.now.cell);
    main.dataset.drawn = `${source.tile.statistic} ${source.covered.from} ${source.covered.to}`;
    say();
  });
  map.over.addEventListener("row", (event) => {
    row = /** @type {CustomEvent<number>} */ (event).detail;
    say();
  });
  const title = () => {
    document.title = `${run.name} · gradwatch`;
    fill(header, heading(run));
  };
  const loadAlerts = async () => {
    const listed = sorted(await api.alerts({ run: runId }));
    map.mark(listed);
    fill(alerts, listed.length ? listed.map((alert) => item(alert)) : el("li", { class: "soft" }, "No alert in this run."));
  };
  view.subscribe((now, before) => {
    say();
    if (now.statistic !== before.statistic || now.parameter !== before.parameter || now.pinned !== before.pinned || now.cell !== before.cell) write(view);
    else if (now.from !== before.from || now.to !== before.to) writeSoon();
  });
  let writing = 0;
  const writeSoon = () => {
    clearTimeout(writing);
    writing = window.setTimeout(() => write(view), 250);
  };

  title();
  fill(
    main,
    header,
    el("section", { class: "card stage", "aria-label": "Layer by step map" }, controls(view), map.box, el("div", { class: "under" }, key.element, values.element)),
    el("section", { class: "card pad" }, el("h2", null, "Alerts"), alerts),
  );
  await Promise.all([source.load(), loadAlerts()]);

  const renew = async () => {
    run = await api.run(runId);
    title();
    view.grow((run.last_step ?? 0) + 1);
    source.renew();
    await loadAlerts();
  };
  const stop = live_(live, runId, renew);
  return {
    close() {
      stop();
      clearTimeout(writing);
      source.close();
      delete main.dataset.drawn;
    },
    arrive() {
      view.set(looking(run));
    },
  };
}

/** Load again when this run changes, at most about twice a second. @param {import("./live.js").Live} live @param {string} runId @param {() => Promise<void>} renew */
function live_(live, runId, renew) {
  let [busy, again] = [false, false];
  const work = async () => {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    do {
      again = false;
      await renew().catch(() => undefined);
    } while (again);
    busy = false;
  };
  /** @param {Event} event */
  const changed = (event) => {
    const changes = /** @type {CustomEvent<{id: string}[]>} */ (event).detail;
    if (changes.some((change) => change.id === runId)) work();
  };
  live.addEventListener("runs", changed);
  live.addEventListener("again", work);
  return () => {
    live.removeEventListener("runs", changed);
    live.removeEventListener("again", work);
  };
}

/** What the address asks to look at. @param {api.RunDetail} run @returns {import("./view.js").Looking} */
function looking(run) {
  const { query } = address.here();
  const end = (run.last_step ?? 0) + 1;
  const from = Math.min(address.whole(query, "from") ?? 0, end - 1);
  const to = Math.min(Math.max(address.whole(query, "to") ?? end, from + 1), end);
  const step = address.whole(query, "step");
  const statistic = query.get("statistic") ?? "ratio";
  const cell = query.get("cell");
  return {
    from,
    to,
    end,
    step,
    pinned: step,
    parameter: query.get("parameter"),
    statistic: STATISTICS.has(statistic) ? statistic : "ratio",
    cell: cell === "min" || cell === "last" ? cell : "max",
    alert: query.get("alert"),
    following: to >= end,
  };
}

/** @param {View} view */
function write({ now }) {
  const whole = now.from <= 0 && now.to >= now.end;
  address.note({
    from: whole ? null : Math.round(now.from),
    to: whole || now.following ? null : Math.round(now.to),
    step: now.pinned,
    parameter: now.parameter,
    statistic: now.statistic === "ratio" ? null : now.statistic,
    cell: now.cell === "max" ? null : now.cell,
    alert: now.alert,
  });
}

/** @param {api.RunDetail} run */
function heading(run) {
  const lost = Object.entries(run.dropped).filter(([, value]) => value > 0);
  return [
    el("div", null, el("p", { class: "soft crumb" }, el("a", { href: "/" }, "Runs"), " / ", run.project), el("h1", null, run.name)),
    el(
      "p",
      { class: "facts" },
      stateSign(run),
      el("span", null, el("b", null, count(run.last_step)), " steps"),
      el("span", null, el("b", null, count(run.parameters.length)), " parameters"),
      el("span", { title: moment(run.last_seen_at) }, "seen ", ago(run.last_seen_at)),
      lost.length > 0 && el("span", { class: "chip warning" }, `dropped: ${lost.map(([name, value]) => `${count(value)} ${name}`).join(", ")}`),
    ),
  ];
}
