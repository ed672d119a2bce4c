// The parameters as a table, the most conspicuous first: the map in numbers and words.

import { cellText } from "../charts/map/readout.js";
import { drawSparkline } from "../charts/sparkline.js";
import { findConspicuous } from "../data/conspicuous.js";
import { count, measured } from "../data/format.js";
import { bucketsWithin, crosshairBucket, orNull } from "../data/tile.js";
import { rangeChanged } from "../data/viewport.js";
import { onThemeChange } from "../dom/canvas.js";
import { button, el, fill, scrollable, tableHead } from "../dom/elements.js";

/** @typedef {import("../data/tile.js").Tile} Tile */
/** @typedef {import("../data/tile.js").BucketRange} BucketRange */
/** @typedef {import("../data/conspicuous.js").Finding} Finding */

const FEW = 12;
const SETTLE_MS = 200;
const COLUMNS = [
  "Parameter",
  "Shape",
  "Over the steps in view",
  "At the crosshair",
  "Smallest",
  "Largest",
  "Why it stands here",
];

export class ParameterTable {
  /**
   * @param {import("../data/viewport.js").Viewport} viewport @param {import("../data/api.js").Parameter[]} parameters
   */
  constructor(viewport, parameters) {
    this.viewport = viewport;
    this.shapes = new Map(parameters.map(({ name, shape }) => [name, shape.join(" × ")]));
    this.showsAll = false;
    /** @type {Tile | null} */
    this.tile = null;
    /** @type {{name: string, row: number, line: HTMLElement, cell: HTMLElement}[]} */
    this.lines = [];
    this.body = el("tbody");
    this.more = button("", () => this.toggle());
    const caption = el("caption", { class: "hidden-text" }, "Parameters, the most conspicuous first");
    const table = el("table", { class: "parameters" }, caption, tableHead(COLUMNS), this.body);
    this.box = el("div", null, scrollable("Parameters", table), this.more);
    onThemeChange(this.box, () => this.draw());
    let timer = 0;
    viewport.subscribe((state, before) => {
      if (rangeChanged(state, before)) {
        clearTimeout(timer);
        timer = window.setTimeout(() => this.draw(), SETTLE_MS);
      }
      if (state.step !== before.step || state.to !== before.to) this.showCrosshair();
      if (state.parameter !== before.parameter) this.showChosen();
    });
  }

  toggle() {
    this.showsAll = !this.showsAll;
    this.draw();
  }

  /** @param {Tile} tile */
  show(tile) {
    this.tile = tile;
    this.draw();
  }

  draw() {
    const { tile } = this;
    if (!tile) return;
    const range = bucketsWithin(tile, this.viewport.state);
    const findings = findConspicuous(tile, range);
    const shown = this.showsAll ? findings : findings.slice(0, FEW);
    this.more.hidden = findings.length <= FEW;
    this.more.textContent = this.showsAll ? "Show the most conspicuous" : `Show all ${count(findings.length)}`;
    this.lines = shown.map((finding) => this.line(tile, finding, range));
    fill(
      this.body,
      this.lines.map(({ line }) => line),
    );
    this.showCrosshair();
    this.showChosen();
  }

  /** @param {Tile} tile @param {Finding} finding @param {BucketRange} range */
  line(tile, { name, row, min, max, reason, tone }, range) {
    const choose = button(name, () => this.viewport.set({ parameter: name }), { class: "plain mono" });
    const cell = el("td", { class: "mono" });
    const line = el(
      "tr",
      null,
      el("th", { scope: "row" }, choose),
      el("td", { class: "soft" }, this.shapes.get(name) || "scalar"),
      el("td", null, sparkline(tile, row, range)),
      cell,
      el("td", { class: "mono" }, Number.isFinite(min) ? measured(min) : "–"),
      el("td", { class: "mono" }, Number.isFinite(max) ? measured(max) : "–"),
      el("td", null, reason && el("span", { class: `chip ${tone}` }, reason)),
    );
    return { name, row, line, cell };
  }

  /** Show the values at the crosshair. */
  showCrosshair() {
    if (!this.tile) return;
    const bucket = crosshairBucket(this.tile, this.viewport.state);
    if (bucket < 0) return;
    for (const { row, cell } of this.lines) {
      const text = cellText(this.tile, bucket, row);
      if (cell.textContent !== text) cell.textContent = text;
    }
  }

  showChosen() {
    for (const { name, line } of this.lines) line.classList.toggle("chosen", name === this.viewport.state.parameter);
  }
}

/** Draw one row of a tile as a sparkline. @param {Tile} tile @param {number} row @param {BucketRange} range */
function sparkline(tile, row, { first, past }) {
  const label = `${tile.parameters[row]} over the steps in view`;
  const canvas = el("canvas", { class: "spark", role: "img", "aria-label": label });
  /** @param {Float32Array} plane */
  const values = (plane) =>
    Array.from({ length: past - first }, (_, index) => orNull(plane[(first + index) * tile.rows + row]));
  drawSparkline(canvas, values(tile.min), values(tile.max), true);
  return canvas;
}
