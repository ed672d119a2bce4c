// Up to four runs side by side: their curves in common charts, their maps in common colours over the same steps.

import { LineChart } from "../charts/line.js";
import { LayerMap } from "../charts/map/layer-map.js";
import { legend } from "../charts/map/legend.js";
import { needLogarithm } from "../charts/scales.js";
import { runState } from "../controls/run-state.js";
import { toolbar } from "../controls/toolbar.js";
import * as api from "../data/api.js";
import { reloadOnRunChanges } from "../data/live.js";
import { current } from "../data/navigation.js";
import { keepPermalink, readPermalink } from "../data/permalink.js";
import { notLoaded, TileSource } from "../data/source.js";
import { SCALARS } from "../data/statistics.js";
import { Viewport } from "../data/viewport.js";
import { el, fill } from "../dom/elements.js";

/** @typedef {{run: api.RunDetail, map: LayerMap, source: TileSource}} Side one of the compared runs */

const MOST_RUNS = 4;
const POINTS = 1000;
const MAP_HEIGHT = 170;
const CHART_HEIGHT = 170;
const SETTLE_MS = 60; // the tiles of the maps arrive one after the other
const NO_SPAN = { low: -6, high: 0 }; // decades of the colours where no run has a sample
const COLOURS = ["accent", "second", "third", "fourth"];
const CURVES = [
  { scalar: "loss", logarithmic: false },
  { scalar: "global_grad_norm", logarithmic: true },
];

/** @param {HTMLElement} main @param {import("../data/navigation.js").PageContext} context */
export async function open(main, { changes }) {
  const ids = (current().query.get("compare") ?? "").split(",").filter(Boolean).slice(0, MOST_RUNS);
  const comparison = new Comparison(main, await Promise.all(ids.map(api.run)));
  const stopPermalink = keepPermalink(comparison.viewport);
  fill(main, comparison.header(), comparison.stage(), comparison.maps());
  await Promise.all(comparison.sides.map(({ source }) => source.load()));
  const stops = comparison.sides.map((side) =>
    reloadOnRunChanges(changes, side.run.id, () => comparison.renew(side), side.source.retry),
  );
  return {
    close() {
      for (const stop of stops) stop();
      stopPermalink();
      comparison.close();
    },
  };
}

class Comparison {
  /** @param {HTMLElement} main @param {api.RunDetail[]} runs */
  constructor(main, runs) {
    this.main = main;
    this.viewport = new Viewport(readPermalink(Math.max(...runs.map((run) => (run.last_step ?? 0) + 1))));
    this.legend = legend();
    this.charts = CURVES.map(({ scalar, logarithmic }) => {
      const options = { logarithmic, height: CHART_HEIGHT };
      return { scalar, logarithmic, chart: new LineChart(this.viewport, SCALARS[scalar], options) };
    });
    /** @type {Side[]} */
    this.sides = runs.map((run) => this.side(run));
    this.request = new AbortController();
    this.timer = 0;
  }

  /** @param {api.RunDetail} run @returns {Side} */
  side(run) {
    const map = new LayerMap(this.viewport, MAP_HEIGHT);
    const width = () => (map.box.clientWidth || this.main.clientWidth / 2) * Math.max(1, window.devicePixelRatio || 1);
    const source = new TileSource(run.id, this.viewport, run.parameters.length, width);
    source.addEventListener("failed", (event) => map.setNote(notLoaded(event)));
    source.addEventListener("tile", () => {
      this.drawMaps();
      clearTimeout(this.timer);
      this.timer = window.setTimeout(() => this.loadCurves().catch(() => undefined), SETTLE_MS);
    });
    return { run, map, source };
  }

  /** Draw all maps in colours that span the values of all of them. */
  drawMaps() {
    const spans = this.sides.filter(({ source }) => source.tile?.steps.length).map(({ source }) => source.decades);
    const low = spans.length ? Math.min(...spans.map((span) => span.low)) : NO_SPAN.low;
    const high = spans.length ? Math.max(...spans.map((span) => span.high)) : NO_SPAN.high;
    this.legend.show({ low, high });
    const loaded = this.sides.filter(({ source }) => source.tile);
    for (const { run, map, source } of loaded) {
      if (source.tile) map.show(source.tile, { low, high });
      map.setNote(source.emptiness(run));
    }
    this.main.dataset.drawn = String(loaded.length);
  }

  /** Load the curves over the steps of the maps' tiles. */
  async loadCurves() {
    this.request.abort();
    this.request = new AbortController();
    const { signal } = this.request;
    const { from, to } = this.sides[0].source.covered;
    for (const { chart, scalar, logarithmic } of this.charts) {
      const query = { statistic: scalar, from_step: from, to_step: to, points: POINTS };
      const series = await Promise.all(this.sides.map(({ run }) => api.series(run.id, query, signal)));
      const lines = this.sides.map(({ run }, index) => ({
        label: run.name,
        colour: COLOURS[index],
        buckets: series[index],
      }));
      chart.setLogarithmic(logarithmic || needLogarithm(series));
      chart.show(lines);
    }
  }

  /** Take in the new samples of a run. @param {Side} side */
  async renew({ run, source }) {
    Object.assign(run, await api.run(run.id));
    this.viewport.extend((run.last_step ?? 0) + 1);
    await source.renew();
  }

  header() {
    const path = el("p", { class: "soft crumb" }, el("a", { href: "/" }, "Runs"), " / compare");
    return el("div", { class: "head" }, el("div", null, path, el("h1", null, `${this.sides.length} runs`)));
  }

  stage() {
    const charts = this.charts.map(({ chart }) => chart.box);
    const under = el("div", { class: "under" }, this.legend.element);
    return el("section", { class: "card stage" }, toolbar(this.viewport), charts, under);
  }

  maps() {
    const maps = this.sides.map(({ run, map }, index) => {
      const dot = el("i", { class: `dot ${COLOURS[index]}` });
      const link = el("a", { href: `/runs/${run.id}` }, run.name);
      return el(
        "section",
        { class: "card stage" },
        el("h2", { class: "side-name" }, dot, link, runState(run)),
        map.box,
      );
    });
    return el("div", { class: "sides" }, maps);
  }

  close() {
    clearTimeout(this.timer);
    this.request.abort();
    for (const { source } of this.sides) source.close();
    for (const { chart } of this.charts) chart.close();
    delete this.main.dataset.drawn;
  }
}
