// The series of the chosen parameter: its statistic before and after clipping, on the map's steps.

import * as api from "./api.js";
import { Chart } from "./chart.js";
import { el, fill } from "./dom.js";
import { measured } from "./format.js";

/** Rules that blame a parameter by its ratio. */
const OF_RATIO = new Set(["exploding"]);
const AFTER = { grad_norm: "clipped_grad_norm" };

export class Trace {
  /** @param {string} runId @param {import("./view.js").View} view */
  constructor(runId, view) {
    this.runId = runId;
    this.view = view;
    this.name = el("b", { class: "mono" });
    this.close_ = el("button", { type: "button", onclick: () => view.set({ parameter: null }) }, "Clear");
    this.hint = el(
      "p",
      { class: "soft hint" },
      "Choose a parameter on the map or in the table below to see its series.",
    );
    this.chart = new Chart(view, "", { log: true, height: 150 });
    this.limit = el("span", { class: "limit" });
    this.head = el("p", { class: "trace-head" }, this.name, this.close_, this.limit);
    /** @type {api.Alert[]} */
    this.alerts = [];
    this.box = el("div", { class: "trace" }, this.hint, this.head, this.chart.box);
    this.covered = { from: 0, to: 0 };
    this.points = 500;
    /** @type {AbortController | null} */
    this.asking = null;
    view.subscribe((now, before) => {
      if (now.parameter !== before.parameter || now.statistic !== before.statistic)
        this.load(this.covered, this.points);
    });
  }

  /** @param {api.Alert[]} alerts */
  mark(alerts) {
    this.alerts = alerts;
  }

  /** The alerts whose limit is one of the statistic that is shown, for the chosen parameter. */
  blaming() {
    const { statistic, parameter } = this.view.now;
    const found = this.alerts.filter(({ rule }) => OF_RATIO.has(rule) && statistic === "ratio");
    return found.flatMap(({ rule, parameters }) =>
      parameters.filter(({ name }) => name === parameter).map(({ limit }) => ({ rule, limit: Number(limit) })),
    );
  }

  rules() {
    return [...new Set(this.blaming().map(({ rule }) => rule))];
  }

  /** @returns {number[]} */
  limits() {
    return [...new Set(this.blaming().map(({ limit }) => limit))].filter(
      (limit) => limit > 0 && Number.isFinite(limit),
    );
  }

  /** @param {{from: number, to: number}} covered @param {number} points */
  async load(covered, points) {
    this.covered = covered;
    this.points = points;
    this.asking?.abort();
    const { parameter, statistic } = this.view.now;
    this.hint.hidden = parameter !== null;
    this.head.hidden = this.chart.box.hidden = parameter === null;
    if (parameter === null) return;
    fill(this.name, parameter);
    const asking = new AbortController();
    this.asking = asking;
    /** @param {string} each */
    const ask = (each) =>
      api.series(
        this.runId,
        { statistic: each, parameter, from_step: covered.from, to_step: covered.to, points },
        asking.signal,
      );
    const after = Reflect.get(AFTER, statistic);
    try {
      const [own, clipped] = await Promise.all([ask(statistic), after ? ask(after) : null]);
      const lines = [{ label: clipped?.steps.length ? "before clipping" : statistic, colour: "accent", series: own }];
      if (clipped?.steps.length) lines.push({ label: "after", colour: "second", series: clipped });
      this.chart.show(lines, this.limits());
      fill(
        this.limit,
        this.chart.limits.length > 0 &&
          `limit of ${this.rules().join(", ")}: ${this.chart.limits.map(measured).join(", ")}`,
      );
    } catch (error) {
      if (!asking.signal.aborted) this.chart.show([]);
    }
  }

  close() {
    this.asking?.abort();
    this.chart.close();
  }
}
