// Sparklines of the loss: only those in sight are asked for and drawn.

import * as api from "../data/api.js";
import { el, fitted, themed } from "../dom/elements.js";

const WIDTH = 120;
const HEIGHT = 28;
const AGAIN_MS = 3000;

/** @typedef {{canvas: HTMLCanvasElement, seen: boolean, step: number | null, drawn: number | null | undefined, at: number, due: number}} Spark */

export class Sparks {
  constructor() {
    /** @type {Map<string, Spark>} */
    this.sparks = new Map();
    this.sight = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const id = /** @type {HTMLElement} */ (entry.target).dataset.run ?? "";
        const spark = this.spark(id);
        spark.seen = entry.isIntersecting;
        if (spark.seen) this.changed(id, spark.step);
      }
    });
  }

  /** @param {string} runId @returns {Spark} */
  spark(runId) {
    const known = this.sparks.get(runId);
    if (known) return known;
    const canvas = el("canvas", { class: "spark", role: "img", "aria-label": "loss over the run" });
    const made = { canvas, seen: false, step: null, drawn: undefined, at: -Infinity, due: 0 };
    this.sparks.set(runId, made);
    return made;
  }

  /** @param {string} runId */
  canvas(runId) {
    return this.spark(runId).canvas;
  }

  /** @param {Element} row @param {string} runId */
  watch(row, runId) {
    this.spark(runId);
    this.sight.observe(row);
  }

  /** @param {string} runId @param {number | null} step */
  changed(runId, step) {
    const spark = this.spark(runId);
    spark.step = step;
    if (!spark.seen || spark.drawn === step || spark.due) return;
    const wait = Math.max(0, spark.at + AGAIN_MS - performance.now());
    spark.due = window.setTimeout(() => this.load(runId, spark), wait);
  }

  /** @param {string} runId @param {Spark} spark */
  async load(runId, spark) {
    spark.at = performance.now();
    const asked = spark.step;
    const series = await api.series(runId, { statistic: "loss", points: 60 }).catch(() => null);
    spark.due = 0;
    spark.drawn = asked;
    if (series) drawSpark(spark.canvas, series.min.map(api.number), series.max.map(api.number));
    if (spark.step !== asked) this.changed(runId, spark.step);
  }
}

/**
 * A min-max band; what is not finite is a dot in the colour of NaN.
 * @param {HTMLCanvasElement} canvas @param {(number | null)[]} low @param {(number | null)[]} high @param {boolean} [logarithmic]
 */
export function drawSpark(canvas, low, high, logarithmic = false) {
  const context = fitted(canvas, WIDTH, HEIGHT);
  /** @param {number | null} value */
  const scaled = (value) => (value === null ? NaN : logarithmic ? Math.log10(Math.max(value, 1e-30)) : value);
  const [lows, highs] = [low.map(scaled), high.map(scaled)];
  const finite = [...lows, ...highs].filter(Number.isFinite);
  const [bottom, top] = [Math.min(...finite), Math.max(...finite)];
  const span = top - bottom || 1;
  /** @param {number} index */
  const x = (index) => 2 + (index / Math.max(1, lows.length - 1)) * (WIDTH - 4);
  /** @param {number} value */
  const y = (value) => HEIGHT - 4 - ((value - bottom) / span) * (HEIGHT - 8);
  context.strokeStyle = themed("accent");
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  let open = false;
  highs.forEach((value, index) => {
    if (!Number.isFinite(value)) {
      open = false;
      return;
    }
    if (open) context.lineTo(x(index), y(value));
    else context.moveTo(x(index), y(value));
    open = true;
    if (lows[index] < value) context.lineTo(x(index), y(lows[index]));
  });
  context.stroke();
  context.fillStyle = themed("bad");
  low.forEach(
    (value, index) => value !== null && !Number.isFinite(value) && context.fillRect(x(index) - 1, HEIGHT - 4, 3, 4),
  );
}

/** @param {Map<string, HTMLElement>} made @param {string} id @param {HTMLElement} row */
export function drop(made, id, row) {
  row.remove();
  made.delete(id);
}
