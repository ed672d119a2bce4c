// A line chart over steps (uPlot), as wide as the map and under its hands: min-max bands, so that no spike is lost.

import { frame, ticks, toX } from "./axis.js";
import { STATES } from "./colours.js";
import { el, fill, onceAFrame, themed, whenThemed } from "../dom/elements.js";
import { measured } from "../data/format.js";
import { joined, logarithmic, maker, padded } from "./scales.js";
import { steer } from "./pointer.js";

/** @typedef {import("../data/api.js").Series} Series */
/** @typedef {{label: string, colour: string, limit?: boolean, series: Series}} Line colour: a name of the theme; limit: dashed */
/** @typedef {import("uplot")} Plot */

const HEIGHT = 92;
const DASH = [6, 4];

export class Chart {
  /** @param {import("../data/viewport.js").View} view @param {string} title @param {{log?: boolean, height?: number, labelled?: boolean}} [kind] */
  constructor(view, title, kind = {}) {
    this.view = view;
    this.title = title;
    this.kind = kind;
    /** @type {Line[]} */
    this.lines = [];
    /** @type {number[]} */
    this.limits = [];
    /** @type {Plot | null} */
    this.plot = null;
    this.values = el("span", { class: "chart-values" });
    this.area = el("div", { class: "chart-area" });
    this.hair = el("i", { class: "hair", "aria-hidden": "true", hidden: true });
    this.area.append(this.hair);
    this.box = el("figure", { class: "chart" }, el("figcaption", null, el("b", null, title), this.values), this.area);
    this.width = 0;
    this.move = onceAFrame(() => this.moved());
    this.remake = onceAFrame(() => this.make());
    view.subscribe(() => this.move());
    new ResizeObserver(([entry]) => {
      if (Math.abs(entry.contentRect.width - this.width) < 1) return;
      this.width = entry.contentRect.width;
      this.remake();
    }).observe(this.area);
    whenThemed(this.box, this.remake);
    steer(this.area, view, () => frame(this.width));
  }

  /** @param {Line[]} lines @param {number[]} [limits] drawn across */
  show(lines, limits = []) {
    this.limits = limits;
    const same =
      this.plot &&
      lines.length === this.lines.length &&
      lines.every((line, index) => line.label === this.lines[index].label);
    this.lines = lines;
    if (same && this.plot) {
      this.plot.setData(/** @type {any} */ (joined(lines, Boolean(this.kind.log))), false);
      this.move();
    } else {
      this.remake();
    }
  }

  /** @param {boolean} log */
  scale(log) {
    if (Boolean(this.kind.log) === log) return;
    this.kind = { ...this.kind, log };
    this.plot?.destroy();
    this.plot = null;
  }

  make() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.width || !this.lines.length) return;
    this.plot = new (maker())(
      this.options(),
      /** @type {any} */ (joined(this.lines, Boolean(this.kind.log))),
      this.area,
    );
    this.moved();
  }

  /** @returns {import("uplot").Options} */
  options() {
    const { left, right } = frame(this.width);
    const soft = themed("soft");
    const grid = { stroke: themed("line"), width: 1 };
    const font = "12px system-ui, sans-serif";
    return {
      width: this.width,
      height: this.kind.height ?? HEIGHT,
      padding: [6, right, 6, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { time: false, auto: false, range: () => [this.view.now.from, this.view.now.to] },
        y: {
          distr: this.kind.log ? 3 : 1,
          range: (_plot, low, high) => padded(low, high, Boolean(this.kind.log), this.limits),
        },
      },
      axes: [
        {
          size: 0,
          gap: 0,
          grid,
          ticks: { show: false },
          values: () => [],
          splits: () => ticks(this.view.now.from, this.view.now.to, this.width / 110),
        },
        {
          size: left,
          stroke: soft,
          grid,
          font,
          ticks: { show: false },
          space: 26,
          ...(this.kind.log ? logarithmic : { values: (_plot, splits) => splits.map(measured) }),
        },
      ],
      series: [{}, ...this.lines.flatMap((line) => drawn(themed(line.colour), line.limit))],
      bands: this.lines.map((line, index) => ({
        series: [index * 3 + 2, index * 3 + 1],
        fill: `color-mix(in srgb, ${themed(line.colour)} 22%, transparent)`,
      })),
      hooks: { draw: [(plot) => this.drawNonfinite(plot), (plot) => this.drawLimits(plot)] },
    };
  }

  /** NaN and infinity have no height: they stand on the floor in their own colour. @param {Plot} plot */
  drawNonfinite(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.fillStyle = STATES.notANumber;
    const pixel = window.devicePixelRatio || 1;
    for (const { series } of this.lines) {
      series.nonfinite.forEach((bad, index) => {
        if (!bad || series.last_steps[index] < this.view.now.from || series.steps[index] >= this.view.now.to) return;
        const left = plot.valToPos(series.steps[index], "x", true);
        const right = plot.valToPos(series.last_steps[index] + 1, "x", true);
        ctx.fillRect(
          Math.floor(left),
          bbox.top + bbox.height - 4 * pixel,
          Math.max(2 * pixel, Math.ceil(right) - Math.floor(left)),
          4 * pixel,
        );
      });
    }
    ctx.restore();
  }

  close() {
    this.plot?.destroy();
    this.plot = null;
  }

  /** @param {Plot} plot */
  drawLimits({ ctx, bbox, valToPos }) {
    ctx.save();
    ctx.strokeStyle = themed("bad");
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

  moved() {
    if (!this.plot) return;
    const { from, to, step } = this.view.now;
    this.plot.setScale("x", { min: from, max: to });
    const seen = step !== null && step >= from && step < to;
    this.hair.hidden = !seen;
    if (seen)
      this.hair.style.left = `${toX(frame(this.width), this.view.now, step + Math.min(0.5, (to - from) / 40))}px`;
    const at = seen ? step : to - 1;
    fill(
      this.values,
      this.lines.map((line) =>
        el(
          "span",
          null,
          el("i", { class: `dot ${line.colour}` }),
          (this.lines.length > 1 || this.kind.labelled) && `${line.label} `,
          el("b", null, valueAt(line, at)),
        ),
      ),
    );
    this.area.setAttribute("aria-label", `${this.title}: ${this.values.textContent}`);
    this.area.setAttribute("role", "img");
  }
}

/** @param {Line} line @param {number} step */
function valueAt({ limit, series }, step) {
  let [low, high] = [0, series.steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (series.steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  const value = series.last[Math.max(0, low - 1)];
  if (limit && value === null) return "none";
  return value === undefined ? "–" : measured(value);
}

/** @param {string} colour @param {boolean} [limit] @returns {import("uplot").Series[]} */
function drawn(colour, limit) {
  const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: false };
  return [{ ...edge }, { ...edge }, { ...edge, stroke: colour, ...(limit ? { width: 1, dash: DASH } : { width: 1.5 }) }];
}
