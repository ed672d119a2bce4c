// The series of the chosen parameter, before and after clipping, and of those kept beside it, on the map's steps.

import * as api from "../data/api.js";
import { Chart } from "./line.js";
import { el, fill } from "../dom/elements.js";
import { measured } from "../data/format.js";
import { limitsOf } from "../data/limits.js";

const KEPT_COLOURS = ["third", "fourth"];
const AFTER = { grad_norm: "clipped_grad_norm" };

export class Trace {
  /** @param {string} runId @param {import("../data/viewport.js").View} view @param {api.Parameter[]} parameters */
  constructor(runId, view, parameters) {
    this.runId = runId;
    this.view = view;
    this.elements = new Map(parameters.map(({ name, shape }) => [name, shape.reduce((all, size) => all * size, 1)]));
    this.name = el("b", { class: "mono" });
    this.close_ = el("button", { type: "button", onclick: () => view.set({ parameter: null, kept: null }) }, "Clear");
    this.keep = el(
      "button",
      { type: "button", title: "Keep this series and choose another parameter", onclick: () => this.keeps() },
      "Keep beside",
    );
    this.beside = el("span", { class: "beside" });
    this.hint = el(
      "p",
      { class: "soft hint" },
      "Choose a parameter on the map or in the table below to see its series.",
    );
    this.chart = new Chart(view, "", { log: true, height: 150 });
    this.limit = el("span", { class: "limit" });
    this.head = el("p", { class: "trace-head" }, this.name, this.keep, this.close_, this.beside, this.limit);
    /** @type {api.Alert[]} */
    this.alerts = [];
    this.box = el("div", { class: "trace" }, this.hint, this.head, this.chart.box);
    this.covered = { from: 0, to: 0 };
    this.points = 500;
    /** @type {AbortController | null} */
    this.asking = null;
    view.subscribe((now, before) => {
      if (now.parameter !== before.parameter || now.statistic !== before.statistic || now.kept !== before.kept)
        this.load(this.covered, this.points);
    });
  }

  /** @param {api.Alert[]} alerts */
  mark(alerts) {
    this.alerts = alerts;
  }

  /** The parameters kept beside the chosen one. */
  kept() {
    const names = (this.view.now.kept ?? "").split("\n");
    return names.filter((name) => this.elements.has(name) && name !== this.view.now.parameter).slice(0, KEPT_COLOURS.length);
  }

  keeps() {
    const { parameter } = this.view.now;
    if (parameter !== null) this.view.set({ kept: [...this.kept(), parameter].slice(-KEPT_COLOURS.length).join("\n") });
  }

  /** @param {string} name */
  drops(name) {
    const left = this.kept().filter((each) => each !== name);
    this.view.set({ kept: left.join("\n") || null });
  }

  /** @param {string[]} names */
  showKept(names) {
    fill(
      this.beside,
      names.map((name) =>
        el("button", { type: "button", "aria-label": `Remove ${name}`, onclick: () => this.drops(name) }, `${name} ×`),
      ),
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
    fill(this.limit);
    if (!this.elements.has(parameter)) {
      fill(this.limit, "This run has no parameter of this name.");
      this.chart.box.hidden = true;
      return;
    }
    const asking = new AbortController();
    this.asking = asking;
    const kept = this.kept();
    this.showKept(kept);
    /** @param {string} each @param {string} [of] */
    const ask = (each, of = parameter) =>
      api.series(
        this.runId,
        { statistic: each, parameter: of, from_step: covered.from, to_step: covered.to, points },
        asking.signal,
      );
    const after = Reflect.get(AFTER, statistic);
    try {
      const [own, clipped, ...beside] = await Promise.all([
        ask(statistic),
        after ? ask(after) : null,
        ...kept.map((name) => ask(statistic, name)),
      ]);
      const label = clipped?.steps.length ? "before clipping" : statistic;
      const lines = [{ label: kept.length ? parameter : label, colour: "accent", series: own }];
      if (clipped?.steps.length) lines.push({ label: "after", colour: "second", series: clipped });
      beside.forEach((series, index) => lines.push({ label: kept[index], colour: KEPT_COLOURS[index], series }));
      const limits = limitsOf(this.alerts, parameter, statistic, this.elements.get(parameter) ?? 1);
      this.chart.show(
        lines,
        limits.map(({ limit }) => limit),
      );
      fill(this.limit, limits.map(({ rule, limit }) => `limit of ${rule}: ${measured(limit)}`).join(", "));
    } catch {
      if (!asking.signal.aborted) this.chart.show([]);
    }
  }

  close() {
    this.asking?.abort();
    this.chart.close();
  }
}
