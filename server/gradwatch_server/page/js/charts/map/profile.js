// The depth profile: one statistic of every parameter at the crosshair, depth downwards beside the map's rows.

import { AXIS, LANE } from "../axis.js";
import { STATES } from "../colours.js";
import { el, fill, fitted, onceAFrame, themed, whenThemed } from "../../dom/elements.js";
import { count, measured, power } from "../../data/format.js";
import { nearest } from "../../data/tile.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */

const BAND_SAMPLES = 50;
const EDGE = 14;

/**
 * The attenuation: log10(value) of weight matrices against their order, by least squares.
 * @param {{order: number, value: number}[]} points
 * @returns {{slope: number, start: number} | null} decades a layer, towards the output; the line's value at order 0
 */
export function attenuation(points) {
  const usable = points.filter(({ value }) => value > 0 && Number.isFinite(value));
  if (usable.length < 3) return null;
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
    this.fit = el("p", { class: "profile-fit soft" });
    this.box = el("div", { class: "profile" }, this.title, this.canvas, this.fit);
    this.draw = onceAFrame(() => this.paint());
    map.view.subscribe(() => this.draw());
    map.box.addEventListener("sized", this.draw);
    new ResizeObserver(this.draw).observe(this.box);
    whenThemed(this.box, this.draw);
  }

  /** The bucket that is looked at: the crosshair's, else the newest in sight. @param {Tile} tile */
  bucket(tile) {
    const { step, to } = this.map.view.now;
    return nearest(tile, step ?? Math.ceil(to) - 1);
  }

  paint() {
    const { tile, scale } = this.map;
    const [width, height] = [this.canvas.clientWidth, this.map.size.height];
    this.canvas.style.height = `${height}px`;
    if (!tile || !width) return;
    const context = fitted(this.canvas, width, height);
    const bucket = this.bucket(tile);
    if (bucket < 0) return;
    const { low, high } = scale;
    const plot = { top: LANE, bottom: height - AXIS, left: EDGE, right: width - EDGE };
    /** @param {number} value */
    const x = (value) =>
      plot.left + Math.min(Math.max((Math.log10(value) - low) / (high - low), -0.03), 1.03) * (plot.right - plot.left);
    /** @param {number} row */
    const y = (row) => plot.top + (row + 0.5) * this.map.rowHeight;
    this.paintGrid(context, plot, low, high);
    paintBand(context, tile, bucket, x, y);
    const line = this.paintFit(context, tile, bucket, x, y);
    this.paintValues(context, tile, bucket, x, y, plot);
    this.say(tile, bucket, line);
  }

  /** @param {CanvasRenderingContext2D} context @param {{top: number, bottom: number, left: number, right: number}} plot @param {number} low @param {number} high */
  paintGrid(context, plot, low, high) {
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "top";
    const stride = Math.ceil((high - low) / 4);
    for (let decade = low; decade <= high; decade += stride) {
      const x = Math.round(plot.left + ((decade - low) / (high - low)) * (plot.right - plot.left)) + 0.5;
      context.strokeStyle = themed("line");
      context.beginPath();
      context.moveTo(x, plot.top);
      context.lineTo(x, plot.bottom);
      context.stroke();
      context.fillStyle = themed("soft");
      context.fillText(power(decade), x, plot.bottom + 6);
    }
  }

  /** @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket @param {(value: number) => number} x @param {(row: number) => number} y */
  paintFit(context, tile, bucket, x, y) {
    const rows = tile.parameters.map((name, row) => ({ name, row })).filter(({ name }) => this.matrices.has(name));
    const line = attenuation(rows.map(({ row }, order) => ({ order, value: tile.last[bucket * tile.rows + row] })));
    if (!line) return null;
    context.strokeStyle = themed("ink");
    context.setLineDash([5, 4]);
    context.beginPath();
    rows.forEach(({ row }, order) => context.lineTo(x(10 ** (line.start + line.slope * order)), y(row)));
    context.stroke();
    context.setLineDash([]);
    return line;
  }

  /** @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket @param {(value: number) => number} x @param {(row: number) => number} y @param {{left: number, right: number}} plot */
  paintValues(context, tile, bucket, x, y, plot) {
    const [accent, ink] = [themed("accent"), themed("ink")];
    const reach = Math.min(3.5, Math.max(1.5, this.map.rowHeight / 3));
    for (let row = 0; row < tile.rows; row++) {
      const value = tile.last[bucket * tile.rows + row];
      if (value === -1) continue;
      const sound = value > 0 && Number.isFinite(value);
      context.fillStyle = sound
        ? accent
        : Number.isNaN(value)
          ? STATES.notANumber
          : value
            ? STATES.infinite
            : ink;
      context.globalAlpha = sound && !this.matrices.has(tile.parameters[row]) ? 0.4 : 1;
      const at = sound ? x(value) : value === 0 ? plot.left - 6 : plot.right + 6;
      context.beginPath();
      context.arc(at, y(row), reach, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  /** @param {Tile} tile @param {number} bucket @param {{slope: number} | null} line */
  say(tile, bucket, line) {
    fill(this.title, el("b", null, "Depth profile"), ` step ${count(tile.lastSteps[bucket])}`);
    const backwards = line ? 10 ** -line.slope : 1;
    const text = line ? `×${measured(backwards)} per layer, backwards` : "no line: too few finite weights";
    this.fit.textContent = text;
    this.canvas.setAttribute("aria-label", `Depth profile at step ${tile.lastSteps[bucket]}: ${text}`);
  }
}

/**
 * Where the values were over the last samples up to the crosshair.
 * @param {CanvasRenderingContext2D} context @param {Tile} tile @param {number} bucket
 * @param {(value: number) => number} x @param {(row: number) => number} y
 */
function paintBand(context, tile, bucket, x, y) {
  const first = Math.max(0, bucket - BAND_SAMPLES + 1);
  const height = Math.max(1, y(1) - y(0) - 1);
  context.fillStyle = themed("accent");
  context.globalAlpha = 0.16;
  for (let row = 0; row < tile.rows; row++) {
    let [low, high] = [Infinity, 0];
    for (let at = first; at <= bucket; at++) {
      const [least, most] = [tile.min[at * tile.rows + row], tile.max[at * tile.rows + row]];
      if (least > 0 && least < low) low = least;
      if (most > high && Number.isFinite(most)) high = most;
    }
    if (low <= high) context.fillRect(x(low), y(row) - height / 2, Math.max(2, x(high) - x(low)), height);
  }
  context.globalAlpha = 1;
}
