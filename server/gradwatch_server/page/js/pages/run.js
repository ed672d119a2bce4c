// The page of one run: its layer x step map and everything else over the same steps.

import { LayerMap } from "../charts/map/layer-map.js";
import { legend } from "../charts/map/legend.js";
import { Profile } from "../charts/map/profile.js";
import { readout } from "../charts/map/readout.js";
import { Strips } from "../charts/strips.js";
import { Trace } from "../charts/trace.js";
import { Advice } from "../controls/advice.js";
import { alertEntry } from "../controls/alert-list.js";
import { AlertPanel } from "../controls/alert-panel.js";
import { chartTable } from "../controls/chart-table.js";
import { ParameterTable } from "../controls/parameters.js";
import { runState } from "../controls/run-state.js";
import { toolbar } from "../controls/toolbar.js";
import { sortAlerts } from "../data/alerts.js";
import * as api from "../data/api.js";
import { ago, count, countEach, countOf, moment, ordinal, percent } from "../data/format.js";
import { reloadOnRunChanges } from "../data/live.js";
import { setTitle } from "../data/navigation.js";
import { keepPermalink, readPermalink } from "../data/permalink.js";
import { notLoaded, TileSource } from "../data/source.js";
import { Viewport } from "../data/viewport.js";
import { descriptions, el, fill } from "../dom/elements.js";

const PARAMETERS_MS = 100; // the map is drawn before the table of parameters
const [FEWEST_POINTS, MOST_POINTS] = [200, 1500];
/** Kinds of events that are shown elsewhere: as a scalar, and in their alert. */
const SHOWN_ELSEWHERE = new Set(["skipped_step", "nonfinite_module"]);

/** @param {HTMLElement} main @param {import("../data/navigation.js").PageContext} context */
export async function open(main, { changes, names: { run: runId } }) {
  const page = new RunPage(main, await api.run(runId));
  const stopPermalink = keepPermalink(page.viewport);
  page.draw();
  await Promise.all([page.source.load(), page.loadAlerts().catch((error) => page.alertsFailed(error))]);
  const stopReloading = reloadOnRunChanges(changes, runId, () => page.renew(), page.source.retry);
  return {
    close() {
      stopReloading();
      stopPermalink();
      page.close();
    },
    queryChanged: () => page.viewport.set(readPermalink(page.viewport.state.end)),
  };
}

class RunPage {
  /** @param {HTMLElement} main @param {api.RunDetail} run */
  constructor(main, run) {
    this.main = main;
    this.run = run;
    /** @type {api.Alert[]} */
    this.alerts = [];
    this.hoveredRow = -1;
    this.timer = 0;
    /** The latest loading of the charts. @type {Promise<unknown>} */
    this.charts = Promise.resolve();

    this.viewport = new Viewport(readPermalink((run.last_step ?? 0) + 1));
    this.map = new LayerMap(this.viewport);
    const width = () => (this.map.box.clientWidth || main.clientWidth) * Math.max(1, window.devicePixelRatio || 1);
    this.source = new TileSource(run.id, this.viewport, run.parameters.length, width);
    const matrices = run.parameters.filter(({ shape }) => shape.length > 1).map(({ name }) => name);
    this.profile = new Profile(this.map, new Set(matrices));
    this.legend = legend();
    this.readout = readout();
    this.trace = new Trace(run.id, this.viewport, run.parameters);
    this.strips = new Strips(run.id, this.viewport);
    this.chartTable = chartTable(this.viewport);
    this.advice = new Advice(run.id, this.viewport);
    this.parameters = new ParameterTable(this.viewport, run.parameters);
    this.panel = new AlertPanel(
      this.viewport,
      () => this.run,
      () => this.loadAlerts(),
    );
    this.header = el("div", { class: "head" });
    this.agentEvents = el("div");
    this.alertList = el("ul", { class: "alerts" });
    this.listen();
  }

  listen() {
    this.map.hovered = (row) => {
      this.hoveredRow = row;
      this.showReadout();
    };
    this.source.addEventListener("tile", () => this.showTile());
    this.source.addEventListener("failed", (event) => this.map.setNote(notLoaded(event)));
    this.strips.box.addEventListener("shown", () => this.chartTable.show(this.strips.shown));
    this.viewport.subscribe((state, before) => {
      this.showReadout();
      if (state.alert !== before.alert) this.showAlerts();
    });
  }

  /** Put everything on the page. */
  draw() {
    this.drawHeader();
    const side = { class: "side", "aria-label": "Depth profile, alerts, advice" };
    const alerts = el("section", { class: "side-part" }, el("h2", null, "Alerts"), this.alertList);
    const stage = el(
      "section",
      { class: "card stage", "aria-label": "Layer by step map" },
      toolbar(this.viewport),
      el(
        "div",
        { class: "stage-body" },
        el(
          "div",
          null,
          this.map.box,
          el("div", { class: "under" }, this.legend.element, this.readout.element),
          this.trace.box,
          this.strips.box,
          this.advice.chart.box,
        ),
        el("aside", side, this.profile.box, alerts, this.advice.box),
      ),
    );
    const title = el("h2", null, "Parameters");
    const parameters = el("section", { class: "card pad" }, title, this.parameters.box, this.chartTable.box);
    fill(this.main, this.header, this.agentEvents, this.panel.box, stage, parameters, about(this.run));
  }

  drawHeader() {
    setTitle(this.run.name);
    fill(this.header, heading(this.run));
    fill(this.agentEvents, agentEvents(this.run));
  }

  /** Show the cell under the pointer or, elsewhere, that of the chosen parameter. */
  showReadout() {
    const { parameter } = this.viewport.state;
    const { tile } = this.source;
    const chosen = tile?.parameters.indexOf(parameter ?? "") ?? -1;
    this.readout.show(tile, this.viewport.state, this.hoveredRow >= 0 ? this.hoveredRow : chosen);
  }

  /** Show a new tile: first the map, then the parts that take longer. */
  showTile() {
    const { tile, decades, covered } = this.source;
    if (!tile) return;
    // 1. Draw the map and the parts that need only the tile.
    this.map.show(tile, decades);
    this.map.setNote(this.source.emptiness(this.run));
    this.legend.show(decades);
    this.profile.draw();
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => this.source.tile && this.parameters.show(this.source.tile), PARAMETERS_MS);
    this.showReadout();
    this.main.dataset.drawn = `${tile.statistic} ${covered.from} ${covered.to}`;
    // 2. Load the charts for the same steps.
    const points = Math.min(MOST_POINTS, Math.max(FEWEST_POINTS, tile.steps.length));
    this.charts = Promise.allSettled([
      this.strips.load(this.run.scalars, covered, points),
      this.trace.load(covered, points),
      this.advice.load(covered),
    ]);
  }

  async loadAlerts() {
    this.alerts = sortAlerts(await api.alerts({ run: this.run.id }));
    this.map.setAlerts(this.alerts);
    this.trace.setAlerts(this.alerts);
    this.showAlerts();
  }

  /** Say in words that the alerts were not loaded; all else is shown. @param {unknown} error */
  alertsFailed(error) {
    const reason = error instanceof Error ? error.message : String(error);
    fill(this.alertList, el("li", { class: "wrong" }, `Not loaded: ${reason}`));
  }

  showAlerts() {
    const open = this.viewport.state.alert;
    fill(
      this.alertList,
      this.alerts.length
        ? this.alerts.map((alert) => alertEntry(alert, undefined, alert.id === open))
        : el("li", { class: "soft" }, "No alert in this run."),
    );
    this.panel.show(this.alerts.find(({ id }) => id === open));
  }

  /** Load the run again and show its new samples. */
  async renew() {
    this.run = await api.run(this.run.id);
    this.drawHeader();
    this.viewport.extend((this.run.last_step ?? 0) + 1);
    await this.source.renew();
    await Promise.all([this.charts, this.loadAlerts()]);
  }

  close() {
    clearTimeout(this.timer);
    this.panel.close();
    this.source.close();
    this.strips.close();
    this.trace.close();
    this.advice.close();
    delete this.main.dataset.drawn;
  }
}

/** @param {api.RunDetail} run */
function heading(run) {
  const dropped = countEach(run.dropped);
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
      runState(run),
      el("span", null, "step ", el("b", null, count(run.last_step))),
      el("span", null, countOf(run.parameters.length, "parameter")),
      sampling(run),
      el("span", { title: moment(run.last_seen_at) }, "seen ", ago(run.last_seen_at)),
      dropped && el("span", { class: "chip warning" }, `dropped: ${dropped}`),
    ),
  ];
}

/** Say how often the agent samples, and what that depends on. @param {api.RunDetail} run */
function sampling({ scalars }) {
  const interval = api.number(scalars.interval_steps) ?? 0;
  if (!(interval >= 1)) return false;
  const why = "As often as the agent's budget for its share of a step allows, or as attach(every=...) says.";
  const often = interval < 1.5 ? "every step" : `every ${ordinal(Math.round(interval))} step`;
  const share = api.number(scalars.overhead_ratio);
  const cost = share === null ? "" : `, costs ${percent(share)} of the time`;
  return el("span", { title: why }, `samples ${often}${cost}`);
}

/** Make the section with events that keep the agent from measuring. @param {api.RunDetail} run */
function agentEvents(run) {
  const events = run.events.filter(({ kind }) => !SHOWN_ELSEWHERE.has(kind));
  if (!events.length) return [];
  const title = "From the agent";
  const entries = events.flatMap(({ kind, step, at, message }) => [
    el("dt", { title: moment(at) }, `${kind}, step ${count(step)}`),
    el("dd", null, message),
  ]);
  const list = el("dl", { class: "evidence" }, entries);
  return [el("section", { class: "card pad", "aria-label": title }, el("h2", null, title), list)];
}

/** Make the section with the attributes that the agent registered. @param {api.RunDetail} run */
function about(run) {
  /** @type {[string, string][]} */
  const facts = [
    ["id", run.id],
    ["started", moment(run.started_at)],
  ];
  if (run.finished_at !== null) facts.push(["finished", moment(run.finished_at)]);
  facts.push(...Object.entries(run.attributes));
  return el(
    "details",
    { class: "card pad about" },
    el("summary", null, "About this run"),
    descriptions("evidence", facts, "mono"),
  );
}
