// Sparklines: small curves without axes. In the list of runs, only those in sight are loaded and drawn.

import * as api from "../data/api.js";
import { onThemeChange, prepareCanvas, themeColour } from "../dom/canvas.js";
import { el } from "../dom/elements.js";

const WIDTH = 120;
const HEIGHT = 28;
const POINTS = 60;
const RELOAD_MS = 3000;
const SMALLEST = 1e-30; // stands for zero on a logarithmic scale

/**
 * @typedef {object} Sparkline
 * @property {HTMLCanvasElement} canvas
 * @property {boolean} visible
 * @property {number | null} step last step of the run
 * @property {number | null | undefined} drawn step up to which it is drawn
 * @property {number} loadedAt @property {number} timer
 * @property {api.Buckets | null} series what is drawn
 */

/** The sparklines of the loss of many runs. */
export class LossSparklines {
  constructor() {
    /** By the run's id. @type {Map<string, Sparkline>} */
    this.sparklines = new Map();
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const runId = /** @type {HTMLElement} */ (target).dataset.run ?? "";
        const sparkline = this.sparkline(runId);
        sparkline.visible = isIntersecting;
        if (isIntersecting) this.update(runId, sparkline.step);
      }
    });
  }

  /** Draw all sparklines again in another theme, as long as the list is on the page. @param {Element} list */
  followTheme(list) {
    onThemeChange(list, () => {
      for (const { canvas, series } of this.sparklines.values()) if (series) drawSeries(canvas, series);
    });
  }

  /** Draw a run's sparkline only while its row is in sight. @param {Element} row has the run's id as data-run */
  observe(row) {
    this.observer.observe(row);
  }

  /** @param {string} runId @returns {HTMLCanvasElement} */
  canvas(runId) {
    return this.sparkline(runId).canvas;
  }

  /** @param {string} runId @returns {Sparkline} */
  sparkline(runId) {
    const existing = this.sparklines.get(runId);
    if (existing) return existing;
    const canvas = el("canvas", { class: "spark", role: "img", "aria-label": "loss over the run" });
    /** @type {Sparkline} */
    const sparkline = {
      canvas,
      visible: false,
      step: null,
      drawn: undefined,
      loadedAt: -Infinity,
      timer: 0,
      series: null,
    };
    this.sparklines.set(runId, sparkline);
    return sparkline;
  }

  /**
   * Take in the last step of a run; draw again if it has moved on.
   * @param {string} runId @param {number | null} step
   */
  update(runId, step) {
    const sparkline = this.sparkline(runId);
    sparkline.step = step;
    if (!sparkline.visible || sparkline.drawn === step || sparkline.timer) return;
    const wait = Math.max(0, sparkline.loadedAt + RELOAD_MS - performance.now());
    sparkline.timer = window.setTimeout(() => this.load(runId, sparkline), wait);
  }

  /** @param {string} runId @param {Sparkline} sparkline */
  async load(runId, sparkline) {
    sparkline.loadedAt = performance.now();
    const { step } = sparkline;
    const series = await api.series(runId, { statistic: "loss", points: POINTS }).catch(() => null);
    sparkline.timer = 0;
    sparkline.drawn = step;
    sparkline.series = series ?? sparkline.series;
    if (series) drawSeries(sparkline.canvas, series);
    if (sparkline.step !== step) this.update(runId, sparkline.step);
  }
}

/** @param {HTMLCanvasElement} canvas @param {api.Buckets} series */
const drawSeries = (canvas, { min, max }) => drawSparkline(canvas, min.map(api.number), max.map(api.number));

/**
 * Draw a band from min to max, with a dot in the colour of NaN at every value that is not finite.
 * @param {HTMLCanvasElement} canvas @param {(number | null)[]} min @param {(number | null)[]} max
 * @param {boolean} [logarithmic]
 */
export function drawSparkline(canvas, min, max, logarithmic = false) {
  const context = prepareCanvas(canvas, WIDTH, HEIGHT);
  /** @param {number | null} value */
  const scaled = (value) => (value === null ? NaN : logarithmic ? Math.log10(Math.max(value, SMALLEST)) : value);
  const [lows, highs] = [min.map(scaled), max.map(scaled)];
  const finite = [...lows, ...highs].filter(Number.isFinite);
  const [bottom, top] = [Math.min(...finite), Math.max(...finite)];
  const span = top - bottom || 1;
  /** @param {number} index */
  const x = (index) => 2 + (index / Math.max(1, lows.length - 1)) * (WIDTH - 4);
  /** @param {number} value */
  const y = (value) => HEIGHT - 4 - ((value - bottom) / span) * (HEIGHT - 8);
  context.strokeStyle = themeColour("accent");
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  highs.forEach((high, index) => {
    if (!Number.isFinite(high)) return;
    if (Number.isFinite(highs[index - 1])) context.lineTo(x(index), y(high));
    else context.moveTo(x(index), y(high));
    if (lows[index] < high) context.lineTo(x(index), y(lows[index]));
  });
  context.stroke();
  // A value without neighbours, such as that of a run's only sample, is a dot.
  context.fillStyle = themeColour("accent");
  highs.forEach((high, index) => {
    const alone = !Number.isFinite(highs[index - 1]) && !Number.isFinite(highs[index + 1]);
    if (Number.isFinite(high) && alone) context.fillRect(x(index) - 1.5, y(high) - 1.5, 3, 3);
  });
  context.fillStyle = themeColour("bad");
  min.forEach((value, index) => {
    if (value !== null && !Number.isFinite(value)) context.fillRect(x(index) - 1, HEIGHT - 4, 3, 4);
  });
}
