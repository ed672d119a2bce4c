// Line charts of the whole run's scalars below the map: loss, norms, learning rate, clipping, the agent's own cost.

import * as api from "../data/api.js";
import { SCALARS } from "../data/statistics.js";
import { el } from "../dom/elements.js";
import { withGaps } from "./gaps.js";
import { LineChart } from "./line.js";
import { needLogarithm } from "./scales.js";

/** @typedef {import("../data/api.js").Buckets} Buckets */
/** @typedef {{scalar: string, label: string, colour: string}} PlannedLine */
/** @typedef {{title: string, logarithmic?: boolean, lines: PlannedLine[]}} Plan */

const LIMIT = "global_grad_norm_limit";

/** @type {Plan[]} */
const PLANS = [
  { title: SCALARS.loss, lines: [{ scalar: "loss", label: "loss", colour: "accent" }] },
  {
    title: SCALARS.global_grad_norm,
    logarithmic: true,
    lines: [
      { scalar: "global_grad_norm", label: "before clipping", colour: "accent" },
      { scalar: "clipped_global_grad_norm", label: "after", colour: "second" },
      { scalar: LIMIT, label: "limit", colour: "bad" },
    ],
  },
  { title: SCALARS.learning_rate, lines: [{ scalar: "learning_rate", label: "rate", colour: "accent" }] },
  {
    title: SCALARS.overhead_ratio,
    logarithmic: true,
    lines: [{ scalar: "overhead_ratio", label: "share", colour: "accent" }],
  },
];
/** Scalars that are not drawn: they only explain others. */
const NOT_DRAWN = new Set(["agent_seconds", "interval_steps", "step_seconds", "clip_norm"]);
/** Counts that are drawn only if there was something to count. */
const COUNTS = new Set(["dropped_bytes", "dropped_samples", "skipped_steps", "removed_grad_norm"]);
const MOST_OTHERS = 12;

/** Return the charts for the scalars that a run has reported. @param {api.Scalars} scalars @returns {Plan[]} */
function planCharts(scalars) {
  const planned = new Set(PLANS.flatMap(({ lines }) => lines.map(({ scalar }) => scalar)));
  const others = Object.keys(scalars)
    .filter((name) => !planned.has(name) && !NOT_DRAWN.has(name))
    .filter((name) => !COUNTS.has(name) || Number(scalars[name]) > 0)
    .sort()
    .slice(0, MOST_OTHERS)
    .map((name) => ({ title: name, lines: [{ scalar: name, label: name, colour: "accent" }] }));
  return [...PLANS, ...others]
    .map((plan) => ({ ...plan, lines: plan.lines.filter(({ scalar }) => scalar in scalars) }))
    .filter(({ lines }) => lines.length);
}

/** Its box dispatches "shown" once all charts are loaded. */
export class Strips {
  /** @param {string} runId @param {import("../data/viewport.js").Viewport} viewport */
  constructor(runId, viewport) {
    this.runId = runId;
    this.viewport = viewport;
    /** By title. @type {Map<string, LineChart>} */
    this.charts = new Map();
    this.box = el("div", { class: "strips" });
    /** @type {AbortController | null} */
    this.request = null;
    /** The series that the charts show, by scalar. @type {Map<string, Buckets>} */
    this.shown = new Map();
  }

  /** @param {api.Scalars} scalars @param {{from: number, to: number}} range @param {number} points */
  async load(scalars, range, points) {
    this.request?.abort();
    const request = new AbortController();
    this.request = request;
    const query = { from_step: range.from, to_step: range.to, points };
    for (const plan of planCharts(scalars)) {
      try {
        const asked = plan.lines.map(({ scalar }) =>
          api.series(this.runId, { statistic: scalar, ...query }, request.signal),
        );
        this.show(plan, await Promise.all(asked));
      } catch (error) {
        if (request.signal.aborted) return;
        this.chart(plan).fail(error); // the charts after it are shown all the same
        if (!(error instanceof api.ApiError)) reportError(error);
      }
    }
    this.box.dispatchEvent(new Event("shown"));
  }

  /** @param {Plan} plan @param {Buckets[]} series one for each line */
  show(plan, series) {
    const lines = plan.lines.map(({ scalar, label, colour }, index) => {
      const limit = scalar === LIMIT;
      return { scalar, label, colour, limit, buckets: limit ? withGaps(series[index], series[0]) : series[index] };
    });
    for (const { scalar, buckets } of lines) this.shown.set(scalar, buckets);
    const chart = this.chart(plan);
    chart.setLogarithmic(plan.logarithmic ?? needLogarithm(series));
    chart.show(lines);
  }

  /** Return the chart of a plan; it is made when it is first needed. @param {Plan} plan */
  chart({ title, logarithmic }) {
    const existing = this.charts.get(title);
    if (existing) return existing;
    const chart = new LineChart(this.viewport, title, { logarithmic });
    this.charts.set(title, chart);
    this.box.append(chart.box);
    return chart;
  }

  close() {
    this.request?.abort();
    for (const chart of this.charts.values()) chart.close();
  }
}
