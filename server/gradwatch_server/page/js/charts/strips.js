// What the whole run did, on the map's steps: loss, norms, learning rate, clipping, the agent's own cost.

import * as api from "../data/api.js";
import { Chart } from "./line.js";
import { el } from "../dom/elements.js";
import { gapped } from "./gaps.js";

/** @typedef {{title: string, log?: boolean, lines: [string, string, string][]}} Plan lines: scalar, label, colour */

const LIMIT = "global_grad_norm_limit";

/** @type {Plan[]} */
const PLANS = [
  { title: "Loss", lines: [["loss", "loss", "accent"]] },
  {
    title: "Global gradient norm",
    log: true,
    lines: [
      ["global_grad_norm", "before clipping", "accent"],
      ["clipped_global_grad_norm", "after", "second"],
      [LIMIT, "limit", "bad"],
    ],
  },
  { title: "Learning rate", lines: [["learning_rate", "rate", "accent"]] },
  { title: "Agent overhead, share of a step", log: true, lines: [["overhead_ratio", "share", "accent"]] },
];
const LEFT_OUT = new Set(["agent_seconds", "interval_steps", "step_seconds", "clip_norm"]);
/** Counts that say something only where there is something to count. */
const COUNTS = new Set(["dropped_bytes", "dropped_samples", "skipped_steps", "removed_grad_norm"]);

/** Whether values span so much that only a logarithm shows them. @param {api.Series[]} series */
export function wide(series) {
  const values = series.flatMap(({ mean }) => mean).filter((value) => typeof value === "number");
  const ordered = values.sort((a, b) => a - b);
  return ordered.length > 1 && ordered[0] > 0 && ordered[ordered.length - 1] > 1e3 * ordered[ordered.length >> 1];
}

export class Strips {
  /** @param {string} runId @param {import("../data/viewport.js").View} view */
  constructor(runId, view) {
    this.runId = runId;
    this.view = view;
    /** @type {Map<string, Chart>} */
    this.charts = new Map();
    this.box = el("div", { class: "strips" });
    /** @type {AbortController | null} */
    this.asking = null;
    /** What the charts show, for the table. @type {Map<string, api.Series>} */
    this.shown = new Map();
  }

  /** The charts for what this run has reported. @param {Record<string, api.Num>} scalars @returns {Plan[]} */
  plans(scalars) {
    const planned = new Set(PLANS.flatMap((plan) => plan.lines.map(([name]) => name)));
    const own = Object.keys(scalars)
      .filter((name) => !planned.has(name) && !LEFT_OUT.has(name))
      .filter((name) => !COUNTS.has(name) || Number(scalars[name]) > 0)
      .sort()
      .slice(0, 12);
    return [...PLANS, ...own.map((name) => /** @type {Plan} */ ({ title: name, lines: [[name, name, "accent"]] }))]
      .map((plan) => ({ ...plan, lines: plan.lines.filter(([name]) => name in scalars) }))
      .filter((plan) => plan.lines.length);
  }

  /** @param {Record<string, api.Num>} scalars @param {{from: number, to: number}} covered @param {number} points */
  async load(scalars, covered, points) {
    this.asking?.abort();
    const asking = new AbortController();
    this.asking = asking;
    const query = { from_step: covered.from, to_step: covered.to, points };
    for (const plan of this.plans(scalars)) {
      try {
        const series = await Promise.all(
          plan.lines.map(([name]) => api.series(this.runId, { statistic: name, ...query }, asking.signal)),
        );
        const lines = plan.lines.map(([name, label, colour], index) => ({
          name,
          label,
          colour,
          limit: name === LIMIT,
          series: name === LIMIT ? gapped(series[index], series[0]) : series[index],
        }));
        for (const { name, series: each } of lines) this.shown.set(name, each);
        const chart = this.chart(plan);
        chart.scale(plan.log ?? wide(series));
        chart.show(lines);
      } catch (error) {
        if (asking.signal.aborted) return;
        if (!(error instanceof api.Refused)) throw error;
      }
    }
    this.box.dispatchEvent(new Event("shown"));
  }

  /** @param {Plan} plan */
  chart(plan) {
    const known = this.charts.get(plan.title);
    if (known) return known;
    const made = new Chart(this.view, plan.title, { log: plan.log });
    this.charts.set(plan.title, made);
    this.box.append(made.box);
    return made;
  }

  close() {
    this.asking?.abort();
    for (const chart of this.charts.values()) chart.close();
  }
}
