// The depth profile: the value of every parameter at the crosshair, in the rows of the map beside it.

import { count, measured, power } from "../../data/format.js";
import { crosshairBucket, MISSING } from "../../data/tile.js";
import { FONT, oncePerFrame, onThemeChange, prepareCanvas, themeColour } from "../../dom/canvas.js";
import { el, fill } from "../../dom/elements.js";
import { ALERT_LANE, AXIS } from "../axis.js";
import { STATES } from "../colours.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */
/** @typedef {import("../../data/tile.js").Decades} Decades */
/**
 * @typedef {object} Plot where values lie on the canvas, in CSS pixels
 * @property {number} left @property {number} right @property {number} top @property {number} bottom
 * @property {(value: number) => number} x @property {(row: number) => number} y
 */

const BAND_BUCKETS = 50;
const EDGE = 14;
const FEWEST_POINTS = 3;

/**
 * Fit the attenuation: log10(value) of the weight matrices against their order, by least squares.
 * @param {{order: number, value: number}[]} points
 * @returns {{slope: number, start: number} | null} slope: decades a layer, towards the output; start: log10 at order 0
 */
function fitAttenuation(points) {
  const usable = points.filter(({ value }) => value > 0 && Number.isFinite(value));
  if (usable.length < FEWEST_POINTS) return null;
  const mean = (/** @type {number[]} */ values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const orders = usable.map(({ order }) => order);
  const logs = usable.map(({ value }) => Math.log10(value));
  const [x, y] = [mean(orders), mean(logs)];
  const spread = orders.reduce((sum, order) => sum + (order - x) ** 2, 0);
  const slope = orders.reduce((sum, order, index) => sum + (order - x) * (logs[index] - y), 0) / spread;
  return { slope, start: y - slope * x };
}

export class Profile {
  /** @param {import("./layer-map.js").LayerMap} map @param {Set<string>} matrices names of the weight matrices */
  constructor(map, matrices) {
    this.map = map;
    this.matrices = matrices;
    this.canvas = el("canvas", { role: "img", "aria-label": "Depth profile" });
    this.title = el("p", { class: "profile-title" });
    this.caption = el("p", { class: "profile-fit soft" });
    this.box = el("div", { class: "profile" }, this.title, this.canvas, this.caption);
    this.draw = oncePerFrame(() => this.drawAll());
    map.viewport.subscribe(() => this.draw());
    map.box.addEventListener("sized", this.draw);
    new ResizeObserver(this.draw).observe(this.box);
    onThemeChange(this.box, () => this.drawAll());
  }

  drawAll() {
    const { tile, decades } = this.map;
    const [width, height] = [this.canvas.clientWidth, this.map.size.height];
    this.canvas.style.height = `${height}px`;
    if (!tile || !width) return;
    const context = prepareCanvas(this.canvas, width, height);
    const bucket = crosshairBucket(tile, this.map.viewport.state);
    if (bucket < 0) {
      this.describeNothing();
      return;
    }
    const plot = this.plot(width, height, decades);
    drawGrid(context, plot, decades);
    drawBand(context, tile, bucket, plot);
    const slope = this.drawFit(context, tile, bucket, plot);
    this.drawValues(context, tile, bucket, plot);
    this.describe(tile.lastSteps[bucket], slope);
  }

  /** @param {number} width @param {number} height @param {Decades} decades @returns {Plot} */
  plot(width, height, { low, high }) {
    const [left, right, top] = [EDGE, width - EDGE, ALERT_LANE];
    return {
      left,
      right,
      top,
      bottom: height - AXIS,
      x: (value) => {
        const share = (Math.log10(value) - low) / (high - low);
        return left + Math.min(Math.max(share, -0.03), 1.03) * (right - left);
      },
      y: (row) => top + (row + 0.5) * this.map.rowHeight,
    };
  }

  /**
   * Draw the fitted line and return its slope.
   * @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket @param {Plot} plot
   */
  drawFit(context, tile, bucket, plot) {
    const rows = tile.parameters.flatMap((name, row) => (this.matrices.has(name) ? [row] : []));
    const fit = fitAttenuation(rows.map((row, order) => ({ order, value: tile.last[bucket * tile.rows + row] })));
    if (!fit) return null;
    context.strokeStyle = themeColour("ink");
    context.setLineDash([5, 4]);
    context.beginPath();
    rows.forEach((row, order) => context.lineTo(plot.x(10 ** (fit.start + fit.slope * order)), plot.y(row)));
    context.stroke();
    context.setLineDash([]);
    return fit.slope;
  }

  /**
   * Draw a dot for every value: weight matrices full, others pale, zero and non-finite ones at the edges.
   * @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket @param {Plot} plot
   */
  drawValues(context, tile, bucket, plot) {
    const [accent, ink] = [themeColour("accent"), themeColour("ink")];
    const radius = Math.min(3.5, Math.max(1.5, this.map.rowHeight / 3));
    /** @param {number} value @returns {[x: number, colour: string]} */
    const place = (value) => {
      if (value === 0) return [plot.left - 6, ink];
      if (Number.isNaN(value)) return [plot.right + 6, STATES.notANumber];
      return Number.isFinite(value) ? [plot.x(value), accent] : [plot.right + 6, STATES.infinite];
    };
    for (let row = 0; row < tile.rows; row++) {
      const value = tile.last[bucket * tile.rows + row];
      if (value <= MISSING) continue;
      const [x, colour] = place(value);
      context.fillStyle = colour;
      context.globalAlpha = colour === accent && !this.matrices.has(tile.parameters[row]) ? 0.4 : 1;
      context.beginPath();
      context.arc(x, plot.y(row), radius, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  /** Say that there is no sample to draw; what was drawn before is gone. */
  describeNothing() {
    fill(this.title, el("b", null, "Depth profile"));
    this.caption.textContent = "no sample";
    this.canvas.setAttribute("aria-label", "Depth profile: no sample");
  }

  /** @param {number} step @param {number | null} slope */
  describe(step, slope) {
    fill(this.title, el("b", null, "Depth profile"), ` step ${count(step)}`);
    const text = slope === null ? "no line: too few finite weights" : `×${measured(10 ** -slope)} per layer, backwards`;
    this.caption.textContent = text;
    this.canvas.setAttribute("aria-label", `Depth profile at step ${step}: ${text}`);
  }
}

/** @param {CanvasRenderingContext2D} context @param {Plot} plot @param {Decades} decades */
function drawGrid(context, plot, { low, high }) {
  context.font = FONT;
  context.textAlign = "center";
  context.textBaseline = "top";
  const stride = Math.ceil((high - low) / 4);
  for (let decade = low; decade <= high; decade += stride) {
    const x = Math.round(plot.left + ((decade - low) / (high - low)) * (plot.right - plot.left)) + 0.5;
    context.strokeStyle = themeColour("line");
    context.beginPath();
    context.moveTo(x, plot.top);
    context.lineTo(x, plot.bottom);
    context.stroke();
    context.fillStyle = themeColour("soft");
    context.fillText(power(decade), x, plot.bottom + 6);
  }
}

/**
 * Draw the range of every parameter's values over the latest buckets.
 * @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket @param {Plot} plot
 */
function drawBand(context, tile, bucket, { x, y }) {
  const first = Math.max(0, bucket - BAND_BUCKETS + 1);
  const height = Math.max(1, y(1) - y(0) - 1);
  context.fillStyle = themeColour("accent");
  context.globalAlpha = 0.16;
  for (let row = 0; row < tile.rows; row++) {
    let [low, high] = [Infinity, 0];
    for (let at = first; at <= bucket; at++) {
      const [min, max] = [tile.min[at * tile.rows + row], tile.max[at * tile.rows + row]];
      if (min > 0 && min < low) low = min;
      if (max > high && Number.isFinite(max)) high = max;
    }
    if (low <= high) context.fillRect(x(low), y(row) - height / 2, Math.max(2, x(high) - x(low)), height);
  }
  context.globalAlpha = 1;
}
