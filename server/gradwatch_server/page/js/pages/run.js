// One run: its map, and everything that hangs on the same steps.

import { Advice } from "../controls/advice.js";
import { alertPanel } from "../controls/alert-panel.js";
import { item, sorted } from "./alerts.js";
import * as api from "../data/api.js";
import { controls } from "../controls/toolbar.js";
import { el, fill } from "../dom/elements.js";
import { ago, count, many, moment } from "../data/format.js";
import { legend } from "../charts/map/legend.js";
import { keepAddress, looking } from "../data/permalink.js";
import { LayerMap } from "../charts/map/layer-map.js";
import { Parameters } from "../controls/parameters.js";
import { Profile } from "../charts/map/profile.js";
import { readout } from "../charts/map/readout.js";
import { stateSign } from "./runs.js";
import { TileSource } from "../data/source.js";
import { Strips } from "../charts/strips.js";
import { Trace } from "../charts/trace.js";
import { valuesTable } from "../controls/chart-table.js";
import { View } from "../data/viewport.js";

const REST_MS = 300;
const TABLE_MS = 100; // the map is drawn first
const TOLD_ELSEWHERE = new Set(["skipped_step", "nonfinite_module"]); // as a scalar, and in its alert

/** @param {HTMLElement} main @param {string} runId @param {import("../data/live.js").Live} live */
export async function runView(main, runId, live) {
  let run = await api.run(runId);
  /** @type {api.Alert[]} */
  let alerts = [];
  const view = new View(looking((run.last_step ?? 0) + 1));
  const map = new LayerMap(view);
  const source = new TileSource(
    runId,
    view,
    run.parameters.length,
    () => (map.box.clientWidth || main.clientWidth) * (window.devicePixelRatio || 1),
  );
  const profile = new Profile(
    map,
    new Set(run.parameters.filter(({ shape }) => shape.length > 1).map(({ name }) => name)),
  );
  const parameters = new Parameters(view, run.parameters);
  const parts = {
    key: legend(),
    values: readout(),
    strips: new Strips(runId, view),
    trace: new Trace(runId, view, run.parameters),
    advice: new Advice(runId, view),
    panel: alertPanel(
      view,
      () => run,
      () => loadAlerts(),
    ),
    table: valuesTable(view),
  };
  const header = el("div", { class: "head" });
  const told = el("div");
  const list = el("ul", { class: "alerts" });
  let row = -1;
  let tableDue = 0;
  /** @type {Promise<unknown>} */
  let charts = Promise.resolve();

  const say = () =>
    parts.values.show(
      source.tile,
      view.now.step,
      row >= 0 ? row : (source.tile?.parameters.indexOf(view.now.parameter ?? "") ?? -1),
    );
  map.hovered = (hovered) => {
    row = hovered;
    say();
  };
  const showAlerts = () => {
    fill(
      list,
      alerts.length
        ? alerts.map((alert) => item(alert, undefined, alert.id === view.now.alert))
        : el("li", { class: "soft" }, "No alert in this run."),
    );
    parts.panel.show(alerts.find((alert) => alert.id === view.now.alert));
  };
  const loadAlerts = async () => {
    alerts = sorted(await api.alerts({ run: runId }));
    map.mark(alerts);
    parts.trace.mark(alerts);
    showAlerts();
  };
  source.addEventListener("tile", () => {
    if (!source.tile) return;
    map.show(source.tile, source.scale);
    parts.key.show(source.scale);
    profile.draw();
    clearTimeout(tableDue);
    tableDue = window.setTimeout(() => source.tile && parameters.show(source.tile), TABLE_MS);
    say();
    main.dataset.drawn = `${source.tile.statistic} ${source.covered.from} ${source.covered.to}`;
    const points = Math.min(1500, Math.max(200, source.tile.steps.length));
    charts = Promise.allSettled([
      parts.strips.load(run.scalars, source.covered, points),
      parts.trace.load(source.covered, points),
      parts.advice.load(source.covered),
    ]);
  });
  parts.strips.box.addEventListener("shown", () => parts.table.show(parts.strips.shown));
  view.subscribe((now, before) => {
    say();
    if (now.alert !== before.alert) showAlerts();
  });
  const stopAddress = keepAddress(view);

  const title = () => {
    document.title = `${run.name} · gradwatch`;
    fill(header, heading(run));
    fill(told, fromAgent(run));
  };
  title();
  fill(
    main,
    header,
    told,
    parts.panel.box,
    el(
      "section",
      { class: "card stage", "aria-label": "Layer by step map" },
      controls(view),
      el(
        "div",
        { class: "stage-body" },
        el(
          "div",
          null,
          map.box,
          el("div", { class: "under" }, parts.key.element, parts.values.element),
          parts.trace.box,
          parts.strips.box,
          parts.advice.chart.box,
        ),
        el(
          "aside",
          { class: "side", "aria-label": "Depth profile, alerts, advice" },
          profile.box,
          el("section", { class: "side-part" }, el("h2", null, "Alerts"), list),
          parts.advice.box,
        ),
      ),
    ),
    el("section", { class: "card pad" }, el("h2", null, "Parameters"), parameters.box, parts.table.box),
    about(run),
  );
  await Promise.all([source.load(), loadAlerts()]);

  const stopLive = following(live, runId, async () => {
    run = await api.run(runId);
    title();
    view.grow((run.last_step ?? 0) + 1);
    await source.renew();
    await Promise.all([charts, loadAlerts()]);
  });
  return {
    close() {
      stopLive();
      stopAddress();
      clearTimeout(tableDue);
      parts.panel.show(undefined);
      source.close();
      parts.strips.close();
      parts.trace.close();
      parts.advice.close();
      delete main.dataset.drawn;
    },
    arrive: () => view.set(looking(view.now.end)),
  };
}

/**
 * Load again whenever this run changes: one load at a time, and no more than half of the time.
 * @param {import("../data/live.js").Live} live @param {string} runId @param {() => Promise<void>} renew
 */
export function following(live, runId, renew) {
  let [busy, again] = [false, false];
  const work = async () => {
    again = true;
    if (busy) return;
    busy = true;
    while (again) {
      again = false;
      const started = performance.now();
      await renew().catch(() => undefined);
      const spent = performance.now() - started;
      await new Promise((resolve) => setTimeout(resolve, Math.max(REST_MS, spent)));
    }
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

/** @param {api.RunDetail} run */
function heading(run) {
  const lost = Object.entries(run.dropped).filter(([, value]) => value > 0);
  return [
    el(
      "div",
      null,
      el("p", { class: "soft crumb" }, el("a", { href: "/" }, "Runs"), " / ", run.project),
      el("h1", null, run.name),
    ),
    el(
      "p",
      { class: "facts" },
      stateSign(run),
      el("span", null, "step ", el("b", null, count(run.last_step))),
      el("span", null, many(run.parameters.length, "parameter")),
      el("span", { title: moment(run.last_seen_at) }, "seen ", ago(run.last_seen_at)),
      lost.length > 0 &&
        el(
          "span",
          { class: "chip warning" },
          `dropped: ${lost.map(([name, value]) => `${count(value)} ${name}`).join(", ")}`,
        ),
    ),
  ];
}

/** What the agent has told that keeps it from measuring. @param {api.RunDetail} run */
function fromAgent(run) {
  const events = run.events.filter(({ kind }) => !TOLD_ELSEWHERE.has(kind));
  if (!events.length) return [];
  return [
    el(
      "section",
      { class: "card pad", "aria-label": "From the agent" },
      el("h2", null, "From the agent"),
      el(
        "dl",
        { class: "evidence" },
        events.flatMap(({ kind, step, at, message }) => [
          el("dt", { title: moment(at) }, `${kind}, step ${count(step)}`),
          el("dd", null, message),
        ]),
      ),
    ),
  ];
}

/** What the agent said about itself. @param {api.RunDetail} run */
function about(run) {
  const listed = [
    ["id", run.id],
    ["started", moment(run.started_at)],
    ...(run.finished_at === null ? [] : [["finished", moment(run.finished_at)]]),
    ...Object.entries(run.attributes),
  ];
  return el(
    "details",
    { class: "card pad about" },
    el("summary", null, "About this run"),
    el(
      "dl",
      { class: "evidence" },
      listed.flatMap(([name, value]) => [el("dt", null, name), el("dd", { class: "mono" }, value)]),
    ),
  );
}
