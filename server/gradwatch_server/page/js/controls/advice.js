// Threshold advice: the share of units that adaptive clipping would have clipped at each threshold.

import { LineChart } from "../charts/line.js";
import * as api from "../data/api.js";
import { count, measured, percent } from "../data/format.js";
import { onThemeChange, prepareCanvas, themeColour } from "../dom/canvas.js";
import { el, fill } from "../dom/elements.js";

/** @typedef {import("../data/api.js").ClipAdvice} ClipAdvice */

const WIDTH = 360;
const HEIGHT = 132;
const EDGE = 8;
const POINTS = 500;
const RELOAD_MS = 5000;
const DEFAULT_THRESHOLD = 0.02;
/** Thirds of the depth, from the input: label and colour. @type {[keyof ClipAdvice["thirds"], string, string][]} */
const THIRDS = [
  ["first", "first third", "second"],
  ["middle", "middle third", "third"],
  ["last", "last third", "fourth"],
];

/**
 * Return the value at a threshold between two of the thresholds, on a logarithmic scale.
 * @param {number[]} thresholds @param {number[]} values @param {number} at
 */
function interpolate(thresholds, values, at) {
  const above = thresholds.findIndex((threshold) => threshold >= at);
  if (above <= 0) return values.at(above) ?? 0;
  const [low, high] = [Math.log(thresholds[above - 1]), Math.log(thresholds[above])];
  const part = (Math.log(at) - low) / (high - low);
  return values[above - 1] * (1 - part) + values[above] * part;
}

/**
 * @typedef {object} Plot where the curves lie on the canvas, in CSS pixels
 * @property {CanvasRenderingContext2D} context @property {number} width
 * @property {(threshold: number) => number} x @property {(share: number) => number} y
 */

export class Advice {
  /** @param {string} runId @param {import("../data/viewport.js").Viewport} viewport */
  constructor(runId, viewport) {
    this.runId = runId;
    /** @type {ClipAdvice | null} */
    this.advice = null;
    this.loadedAt = -Infinity;
    this.loadedFrom = -1;
    this.chosen = false;
    this.canvas = el("canvas", { class: "advice-curve", role: "img" });
    const slide = () => {
      this.chosen = true;
      this.show();
    };
    this.slider = el("input", { type: "range", min: 0, step: 1, "aria-label": "Threshold", oninput: slide });
    const key = el(
      "p",
      { class: "advice-key soft" },
      THIRDS.map(([, label, colour]) => el("span", null, el("i", { class: `dot ${colour}` }), label)),
      el("span", null, el("i", { class: "dot" }), "all"),
    );
    this.text = el("p", { role: "status" });
    this.reason = el("p", { class: "soft" });
    const title = el("h2", null, "Threshold advice");
    const parts = [title, this.canvas, this.slider, key, this.text, this.reason];
    this.box = el("section", { class: "side-part advice", hidden: true }, parts);
    this.chart = new LineChart(viewport, "Share of units clipped", { labelled: true });
    this.chart.box.hidden = true;
    new ResizeObserver(() => this.draw()).observe(this.box);
    onThemeChange(this.box, () => this.draw());
  }

  /** Return the index of the threshold that the slider shows. */
  get index() {
    return Number(this.slider.value);
  }

  /** @param {{from: number, to: number}} range */
  async load({ from, to }) {
    const now = performance.now();
    if (now - this.loadedAt < RELOAD_MS && from === this.loadedFrom) return;
    [this.loadedAt, this.loadedFrom] = [now, from];
    const advice = await this.ask(from, to);
    if (!advice) return;
    this.box.hidden = this.chart.box.hidden = advice.samples === 0;
    if (!advice.samples) return;
    this.advice = advice;
    this.slider.max = String(advice.thresholds.length - 1);
    const proposed = advice.recommended ?? advice.clip ?? DEFAULT_THRESHOLD;
    if (!this.chosen) this.slider.value = String(Math.max(0, advice.thresholds.indexOf(proposed)));
    this.show();
  }

  /**
   * Return the advice; null, which is said in words, if it cannot be loaded.
   * @param {number} from @param {number} to
   */
  async ask(from, to) {
    try {
      return await api.clipAdvice(this.runId, { from_step: from, to_step: to, points: POINTS });
    } catch (error) {
      this.box.hidden = false;
      this.text.textContent = `Not loaded: ${error instanceof Error ? error.message : error}`;
      return null;
    }
  }

  /** Show the threshold of the slider in the text, the chart and the curve. */
  show() {
    if (!this.advice) return;
    this.describe(this.advice);
    if (this.advice.rates.length) this.chart.show(this.lines(this.advice));
    this.draw();
  }

  /** @param {ClipAdvice} advice */
  describe({ thresholds, shares, steps, clip, recommended, reason }) {
    const threshold = measured(thresholds[this.index]);
    const share = percent(shares[this.index]);
    this.slider.setAttribute("aria-valuetext", `${threshold} clips ${share} of the units`);
    fill(
      this.text,
      "A threshold of ",
      el("b", null, threshold),
      " would have clipped ",
      el("b", null, share),
      ` of the units in ${count(steps.length)} samples.`,
      clip !== null && [" In force: ", el("b", null, measured(clip)), "."],
    );
    fill(this.reason, recommended !== null && [el("b", null, `Recommended: ${measured(recommended)}. `)], reason);
  }

  /**
   * Return the share of units clipped over the steps, at the slider's threshold and at the one in force.
   * @param {ClipAdvice} advice
   */
  lines(advice) {
    const { thresholds, clip } = advice;
    const chosen = thresholds[this.index];
    const lines = [line(`at ${measured(chosen)}`, "accent", advice, (row) => row[this.index])];
    if (clip === null || clip === chosen) return lines;
    const label = `in force, ${measured(clip)}`;
    return [...lines, line(label, "second", advice, (row) => interpolate(thresholds, row, clip))];
  }

  /** Draw the curves of share by threshold. */
  draw() {
    if (!this.advice) return;
    const { thresholds, shares, thirds, clip, recommended } = this.advice;
    const plot = this.plot(thresholds);
    // 1. The grid, and the recommended threshold behind everything.
    for (const share of [0, 0.5, 1]) drawSegment(plot, EDGE, Math.round(plot.y(share)) + 0.5, plot.width - 2 * EDGE);
    if (recommended !== null) drawBar(plot, plot.x(recommended), 18, "quiet-back");
    // 2. The curves.
    for (const [name, , colour] of THIRDS) drawCurve(plot, thresholds, thirds[name], colour, 1.2);
    drawCurve(plot, thresholds, shares, "accent", 2.2);
    // 3. The threshold in force and that of the slider.
    if (clip !== null) drawClip(plot, clip);
    drawBar(plot, plot.x(thresholds[this.index]), 1, "ink");
    drawDot(plot, thresholds[this.index], shares[this.index]);
    // 4. The axis, and all of it in words.
    drawThresholds(plot, thresholds);
    const texts = thresholds.map((threshold, index) => `${threshold}: ${percent(shares[index])}`);
    this.canvas.setAttribute("aria-label", `Share of units clipped by threshold. ${texts.join(", ")}`);
  }

  /** @param {number[]} thresholds @returns {Plot} */
  plot(thresholds) {
    const width = Math.min(WIDTH, this.canvas.clientWidth || WIDTH);
    const [least, most] = [Math.log(thresholds[0]), Math.log(thresholds[thresholds.length - 1])];
    return {
      context: prepareCanvas(this.canvas, width, HEIGHT),
      width,
      x: (threshold) => ((Math.log(threshold) - least) / (most - least)) * (width - 2 * EDGE) + EDGE,
      y: (share) => HEIGHT - 22 - share * (HEIGHT - 34),
    };
  }

  close() {
    this.chart.close();
  }
}

/** @param {Plot} plot @param {number} x @param {number} y @param {number} width */
function drawSegment({ context }, x, y, width) {
  context.strokeStyle = themeColour("line");
  context.strokeRect(x, y, width, 0);
}

/**
 * Draw an upright bar over the whole height.
 * @param {Plot} plot @param {number} x @param {number} width @param {string} colour
 */
function drawBar({ context, y }, x, width, colour) {
  context.fillStyle = themeColour(colour);
  context.fillRect(x - width / 2, y(1) - EDGE, width, y(0) - y(1) + EDGE);
}

/**
 * @param {Plot} plot @param {number[]} thresholds @param {number[]} shares @param {string} colour @param {number} width
 */
function drawCurve({ context, x, y }, thresholds, shares, colour, width) {
  context.beginPath();
  shares.forEach((share, index) => context.lineTo(x(thresholds[index]), y(share)));
  context.strokeStyle = themeColour(colour);
  context.lineWidth = width;
  context.stroke();
}

/** Draw the threshold in force, at the edge if it lies beyond the scale. @param {Plot} plot @param {number} clip */
function drawClip({ context, width, x, y }, clip) {
  context.setLineDash([4, 3]);
  context.strokeStyle = themeColour("bad");
  context.lineWidth = 1;
  const inside = Math.min(width - EDGE, Math.max(EDGE, x(clip)));
  context.strokeRect(inside, y(1) - EDGE, 0, y(0) - y(1) + EDGE);
  context.setLineDash([]);
}

/** @param {Plot} plot @param {number} threshold @param {number} share */
function drawDot({ context, x, y }, threshold, share) {
  context.fillStyle = themeColour("ink");
  context.beginPath();
  context.arc(x(threshold), y(share), 4, 0, 7);
  context.fill();
}

/** Write every second threshold below the curves. @param {Plot} plot @param {number[]} thresholds */
function drawThresholds({ context, width, x }, thresholds) {
  const last = thresholds.length - 1;
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = themeColour("soft");
  context.textBaseline = "bottom";
  for (let index = 0; index <= last; index += 2) {
    context.textAlign = index === 0 ? "left" : index === last ? "right" : "center";
    const left = index === 0 ? 2 : index === last ? width - 2 : x(thresholds[index]);
    context.fillText(String(thresholds[index]), left, HEIGHT);
  }
}

/**
 * Return a line of one value a step.
 * @param {string} label @param {string} colour @param {ClipAdvice} advice @param {(row: number[]) => number} value
 */
function line(label, colour, { steps, rates }, value) {
  const values = rates.map(value);
  const nonfinite = steps.map(() => 0);
  const buckets = { steps, last_steps: steps, min: values, max: values, mean: values, last: values, nonfinite };
  return { label, colour, buckets };
}
