// A chart of lines over steps, drawn by uPlot: bands from min to max, so that no spike is lost.

import { bucketAt } from "../data/tile.js";
import { measured } from "../data/format.js";
import { FONT, oncePerFrame, onThemeChange, themeColour } from "../dom/canvas.js";
import { el, fill } from "../dom/elements.js";
import { crosshairX, frame, ticks } from "./axis.js";
import { STATES } from "./colours.js";
import { listenToPointer } from "./pointer.js";
import { joinLines, logarithmicAxis, lonePoints, uPlot, valueRange } from "./scales.js";

/** @typedef {import("../data/api.js").Buckets} Buckets */
/**
 * @typedef {object} Line
 * @property {string} label @property {string} colour name of a theme colour
 * @property {boolean} [limit] a limit is dashed, and may be absent
 * @property {Buckets} buckets
 */
/**
 * @typedef {object} Options
 * @property {boolean} [logarithmic] @property {number} [height] in CSS pixels
 * @property {boolean} [labelled] whether a single line is labelled too
 */

const HEIGHT = 92;
const DASH = [6, 4];
const NONFINITE_PIXELS = 4;
const NARROWEST_PIXELS = 2;
const SERIES_PER_LINE = 3; // min, max, mean

export class LineChart {
  /** @param {import("../data/viewport.js").Viewport} viewport @param {string} title @param {Options} [options] */
  constructor(viewport, title, { logarithmic = false, height = HEIGHT, labelled = false } = {}) {
    this.viewport = viewport;
    this.title = title;
    this.logarithmic = logarithmic;
    this.height = height;
    this.labelled = labelled;
    /** @type {Line[]} */
    this.lines = [];
    /** @type {number[]} */
    this.limits = [];
    /** @type {import("uplot") | null} */
    this.plot = null;
    this.width = 0;
    this.values = el("span", { class: "chart-values" });
    this.hair = el("i", { class: "hair", "aria-hidden": "true", hidden: true });
    this.area = el("div", { class: "chart-area" }, this.hair);
    this.box = el("figure", { class: "chart" }, el("figcaption", null, el("b", null, title), this.values), this.area);
    this.move = oncePerFrame(() => this.followViewport());
    this.recreate = oncePerFrame(() => this.create());
    viewport.subscribe(() => this.move());
    new ResizeObserver(([entry]) => this.resize(entry.contentRect.width)).observe(this.area);
    onThemeChange(this.box, () => this.create());
    listenToPointer(this.area, viewport, () => frame(this.width));
  }

  /** @param {Line[]} lines @param {number[]} [limits] values at which a dashed line is drawn across */
  show(lines, limits = []) {
    this.limits = limits;
    const sameLines =
      lines.length === this.lines.length && lines.every(({ label }, index) => label === this.lines[index].label);
    this.lines = lines;
    if (!this.plot || !sameLines) {
      this.recreate();
      return;
    }
    this.plot.setData(joinLines(lines, this.logarithmic), false);
    this.move();
  }

  /** @param {boolean} logarithmic */
  setLogarithmic(logarithmic) {
    if (this.logarithmic === logarithmic) return;
    this.logarithmic = logarithmic;
    this.close();
  }

  /** @param {number} width in CSS pixels */
  resize(width) {
    if (Math.abs(width - this.width) < 1) return;
    this.width = width;
    this.recreate();
  }

  create() {
    this.close();
    if (!this.width || !this.lines.length) return;
    try {
      this.plot = new (uPlot())(this.options(), joinLines(this.lines, this.logarithmic), this.area);
      this.followViewport();
    } catch (error) {
      this.fail(error, "Not drawn");
      reportError(error);
    }
  }

  /** Say in words why the chart shows nothing. @param {unknown} error @param {string} [what] */
  fail(error, what = "Not loaded") {
    this.close();
    this.lines = [];
    const text = `${what}: ${error instanceof Error ? error.message : error}`;
    fill(this.values, el("span", { class: "wrong" }, text));
  }

  /** @returns {import("uplot").Options} */
  options() {
    return {
      width: this.width,
      height: this.height,
      padding: [6, frame(this.width).right, 6, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { time: false, auto: false, range: () => [this.viewport.state.from, this.viewport.state.to] },
        y: {
          distr: this.logarithmic ? 3 : 1,
          range: (_plot, low, high) => valueRange(low, high, this.logarithmic, this.limits),
        },
      },
      axes: this.axes(),
      series: [{}, ...this.lines.flatMap(({ colour, limit }) => lineSeries(themeColour(colour), limit))],
      bands: this.lines.map(({ colour }, index) => ({
        series: [index * SERIES_PER_LINE + 2, index * SERIES_PER_LINE + 1],
        fill: `color-mix(in srgb, ${themeColour(colour)} 22%, transparent)`,
      })),
      hooks: { draw: [(plot) => this.drawNonfinite(plot), (plot) => this.drawLimits(plot)] },
    };
  }

  /** @returns {import("uplot").Axis[]} */
  axes() {
    const grid = { stroke: themeColour("line"), width: 1 };
    const splits = () => ticks(this.viewport.state.from, this.viewport.state.to, this.width / 110);
    const linear = { values: (/** @type {unknown} */ _plot, /** @type {number[]} */ values) => values.map(measured) };
    return [
      { size: 0, gap: 0, grid, ticks: { show: false }, values: () => [], splits },
      {
        size: frame(this.width).left,
        stroke: themeColour("soft"),
        grid,
        font: FONT,
        ticks: { show: false },
        space: 26,
        ...(this.logarithmic ? logarithmicAxis : linear),
      },
    ];
  }

  /**
   * Mark buckets with a NaN or an infinity, which have no height, on the floor of the plot.
   * @param {import("uplot")} plot
   */
  drawNonfinite(plot) {
    const { ctx, bbox } = plot;
    const { from, to } = this.viewport.state;
    const scale = window.devicePixelRatio || 1;
    const height = NONFINITE_PIXELS * scale;
    ctx.save();
    ctx.fillStyle = STATES.notANumber;
    for (const { buckets } of this.lines) {
      buckets.nonfinite.forEach((number, index) => {
        const [first, last] = [buckets.steps[index], buckets.last_steps[index]];
        if (!number || last < from || first >= to) return;
        const left = Math.floor(plot.valToPos(first, "x", true));
        const right = Math.ceil(plot.valToPos(last + 1, "x", true));
        const width = Math.max(NARROWEST_PIXELS * scale, right - left);
        ctx.fillRect(left, bbox.top + bbox.height - height, width, height);
      });
    }
    ctx.restore();
  }

  /** @param {import("uplot")} plot */
  drawLimits({ ctx, bbox, valToPos }) {
    ctx.save();
    ctx.strokeStyle = themeColour("bad");
    ctx.lineWidth = window.devicePixelRatio || 1;
    ctx.setLineDash(DASH);
    for (const limit of this.limits) {
      const y = valToPos(limit, "y", true);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.restore();
  }

  /** Show the visible range, the crosshair, and the values at the crosshair or else at the right edge. */
  followViewport() {
    if (!this.plot) return;
    const { from, to, step } = this.viewport.state;
    this.plot.setScale("x", { min: from, max: to });
    const visible = step !== null && step >= from && step < to;
    this.hair.hidden = !visible;
    if (visible) this.hair.style.left = `${crosshairX(frame(this.width), this.viewport.state, step)}px`;
    this.showValues(visible ? step : to - 1);
    this.area.setAttribute("aria-label", `${this.title}: ${this.values.textContent}`);
    this.area.setAttribute("role", "img");
  }

  /** @param {number} step */
  showValues(step) {
    const labelled = this.lines.length > 1 || this.labelled;
    fill(
      this.values,
      this.lines.map((line) =>
        el(
          "span",
          null,
          el("i", { class: `dot ${line.colour}` }),
          labelled && `${line.label} `,
          el("b", null, valueText(line, step)),
        ),
      ),
    );
  }

  close() {
    this.plot?.destroy();
    this.plot = null;
  }
}

/** @param {Line} line @param {number} step */
function valueText({ limit, buckets }, step) {
  const value = buckets.last[Math.max(0, bucketAt(buckets.steps, step))];
  if (limit && value === null) return "none";
  return value === undefined ? "–" : measured(value);
}

/** @param {string} colour @param {boolean} [limit] @returns {import("uplot").Series[]} */
function lineSeries(colour, limit) {
  const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: false };
  return [
    { ...edge },
    { ...edge },
    {
      ...edge,
      stroke: colour,
      ...(limit ? { width: 1, dash: DASH } : { width: 1.5 }),
      points: { show: true, size: 5, width: 0, fill: colour, filter: lonePoints },
    },
  ];
}
