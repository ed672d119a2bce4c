// The series of the chosen parameter, before and after clipping, and of the parameters kept beside it.

import { chartLimits } from "../data/alerts.js";
import * as api from "../data/api.js";
import { measured } from "../data/format.js";
import { AFTER_CLIPPING } from "../data/statistics.js";
import { button, el, fill } from "../dom/elements.js";
import { LineChart } from "./line.js";

const KEPT_COLOURS = ["third", "fourth"];
const HEIGHT = 150;
const POINTS = 500;

export class Trace {
  /**
   * @param {string} runId @param {import("../data/viewport.js").Viewport} viewport @param {api.Parameter[]} parameters
   */
  constructor(runId, viewport, parameters) {
    this.runId = runId;
    this.viewport = viewport;
    /** Number of elements of each parameter. */
    this.elements = new Map(parameters.map(({ name, shape }) => [name, shape.reduce((all, size) => all * size, 1)]));
    /** @type {api.Alert[]} */
    this.alerts = [];
    this.range = { from: 0, to: 0 };
    this.points = POINTS;
    /** @type {AbortController | null} */
    this.request = null;
    this.name = el("b", { class: "mono" });
    this.kept = el("span", { class: "beside" });
    this.limit = el("span", { class: "limit" });
    const choose = "Choose a parameter on the map or in the table below to see its series.";
    this.hint = el("p", { class: "soft hint" }, choose);
    const keep = button("Keep beside", () => this.keep(), { title: "Keep this series and choose another parameter" });
    const clear = button("Clear", () => viewport.set({ parameter: null, kept: null }));
    this.head = el("p", { class: "trace-head" }, this.name, keep, clear, this.kept, this.limit);
    this.chart = new LineChart(viewport, "", { logarithmic: true, height: HEIGHT });
    this.box = el("div", { class: "trace" }, this.hint, this.head, this.chart.box);
    viewport.subscribe((state, before) => {
      if (state.parameter !== before.parameter || state.statistic !== before.statistic || state.kept !== before.kept)
        this.load(this.range, this.points);
    });
  }

  /** @param {api.Alert[]} alerts whose limits are drawn */
  setAlerts(alerts) {
    this.alerts = alerts;
  }

  /** Return the names of the parameters that are kept beside the chosen one. */
  keptNames() {
    const { kept, parameter } = this.viewport.state;
    const names = (kept ?? "").split("\n").filter((name) => this.elements.has(name) && name !== parameter);
    return names.slice(0, KEPT_COLOURS.length);
  }

  keep() {
    const { parameter } = this.viewport.state;
    if (parameter === null) return;
    const names = [...this.keptNames(), parameter].slice(-KEPT_COLOURS.length);
    this.viewport.set({ kept: names.join("\n") });
  }

  /** @param {string} name */
  stopKeeping(name) {
    const names = this.keptNames().filter((each) => each !== name);
    this.viewport.set({ kept: names.join("\n") || null });
  }

  /** @param {string[]} names */
  showKept(names) {
    fill(
      this.kept,
      names.map((name) => button(`${name} ×`, () => this.stopKeeping(name), { "aria-label": `Remove ${name}` })),
    );
  }

  /** @param {{from: number, to: number}} range @param {number} points */
  async load(range, points) {
    this.range = range;
    this.points = points;
    this.request?.abort();
    const { parameter } = this.viewport.state;
    this.hint.hidden = parameter !== null;
    this.head.hidden = this.chart.box.hidden = parameter === null;
    if (parameter === null) return;
    fill(this.name, parameter);
    fill(this.limit);
    if (!this.elements.has(parameter)) {
      fill(this.limit, "This run has no parameter of this name.");
      this.chart.box.hidden = true;
      return;
    }
    const request = new AbortController();
    this.request = request;
    const kept = this.keptNames();
    this.showKept(kept);
    try {
      const lines = await this.loadLines(parameter, kept, request.signal);
      this.show(parameter, lines);
    } catch (error) {
      if (!request.signal.aborted) this.chart.fail(error);
    }
  }

  /**
   * @param {string} parameter @param {string[]} kept @param {AbortSignal} signal
   * @returns {Promise<import("./line.js").Line[]>}
   */
  async loadLines(parameter, kept, signal) {
    const { statistic } = this.viewport.state;
    /** @param {string} name @param {string} ofParameter */
    const load = (name, ofParameter) => {
      const { from, to } = this.range;
      const query = { statistic: name, parameter: ofParameter, from_step: from, to_step: to, points: this.points };
      return api.series(this.runId, query, signal);
    };
    const clippedStatistic = AFTER_CLIPPING[statistic];
    const [own, clipped, ...beside] = await Promise.all([
      load(statistic, parameter),
      clippedStatistic ? load(clippedStatistic, parameter) : null,
      ...kept.map((name) => load(statistic, name)),
    ]);
    const label = clipped?.steps.length ? "before clipping" : statistic;
    const lines = [{ label: kept.length ? parameter : label, colour: "accent", buckets: own }];
    if (clipped?.steps.length) lines.push({ label: "after", colour: "second", buckets: clipped });
    beside.forEach((buckets, index) => lines.push({ label: kept[index], colour: KEPT_COLOURS[index], buckets }));
    return lines;
  }

  /** @param {string} parameter @param {import("./line.js").Line[]} lines */
  show(parameter, lines) {
    const { statistic } = this.viewport.state;
    const limits = chartLimits(this.alerts, parameter, statistic, this.elements.get(parameter) ?? 1);
    this.chart.show(
      lines,
      limits.map(({ limit }) => limit),
    );
    fill(this.limit, limits.map(({ rule, limit }) => `limit of ${rule}: ${measured(limit)}`).join(", "));
  }

  close() {
    this.request?.abort();
    this.chart.close();
  }
}
