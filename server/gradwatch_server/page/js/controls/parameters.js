// The parameters as a table, the most conspicuous first: what the map says, in numbers and words.

import { findings } from "../data/conspicuous.js";
import { el, fill } from "../dom/elements.js";
import { count, measured } from "../data/format.js";
import { cellText } from "../charts/map/readout.js";
import { drawSpark } from "../charts/sparkline.js";
import { nearest, seenBuckets } from "../data/tile.js";

const FEW = 12;
const HEAD = [
  "Parameter",
  "Shape",
  "Over the steps in view",
  "At the crosshair",
  "Smallest",
  "Largest",
  "Why it stands here",
];

export class Parameters {
  /** @param {import("../data/viewport.js").View} view @param {import("../data/api.js").Parameter[]} parameters */
  constructor(view, parameters) {
    this.view = view;
    this.shapes = new Map(parameters.map((parameter) => [parameter.name, parameter]));
    this.all = false;
    /** @type {import("../data/tile.js").Tile | null} */
    this.tile = null;
    this.rows = el("tbody");
    this.more = el("button", { type: "button", onclick: () => this.toggle() });
    /** @type {{row: number, cell: HTMLElement, line: HTMLElement, name: string}[]} */
    this.lines = [];
    const head = el(
      "tr",
      null,
      HEAD.map((name) => el("th", { scope: "col" }, name)),
    );
    const caption = el("caption", { class: "hidden-text" }, "Parameters, the most conspicuous first");
    this.box = el(
      "div",
      null,
      el(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Parameters" },
        el("table", { class: "parameters" }, caption, el("thead", null, head), this.rows),
      ),
      this.more,
    );
    let due = 0;
    view.subscribe((now, before) => {
      if (now.from !== before.from || now.to !== before.to) {
        clearTimeout(due);
        due = window.setTimeout(() => this.tile && this.show(this.tile), 200);
      }
      if (now.step !== before.step || now.to !== before.to) this.values();
      if (now.parameter !== before.parameter) this.chosen();
    });
  }

  toggle() {
    this.all = !this.all;
    if (this.tile) this.show(this.tile);
  }

  /** @param {import("../data/tile.js").Tile} tile */
  show(tile) {
    this.tile = tile;
    const span = seenBuckets(tile, this.view.now);
    const found = findings(tile, span);
    const seen = this.all ? found : found.slice(0, FEW);
    this.more.hidden = found.length <= FEW;
    this.more.textContent = this.all ? "Show the most conspicuous" : `Show all ${count(found.length)}`;
    this.lines = [];
    fill(
      this.rows,
      seen.map((finding) => this.line(tile, finding, span)),
    );
    this.values();
    this.chosen();
  }

  /** @param {import("../data/tile.js").Tile} tile @param {import("../data/conspicuous.js").Finding} finding @param {import("../data/conspicuous.js").Span} span */
  line(tile, finding, { first, past }) {
    const parameter = this.shapes.get(finding.name);
    const canvas = el("canvas", {
      class: "spark",
      role: "img",
      "aria-label": `${finding.name} over the steps in view`,
    });
    const [low, high] = [tile.min, tile.max].map((plane) =>
      Array.from({ length: past - first }, (_, index) => plane[(first + index) * tile.rows + finding.row]).map(
        (value) => (value === -1 ? null : value),
      ),
    );
    drawSpark(canvas, low, high, true);
    const cell = el("td", { class: "mono" });
    const name = el(
      "button",
      { type: "button", class: "plain mono", onclick: () => this.view.set({ parameter: finding.name }) },
      finding.name,
    );
    const line = el(
      "tr",
      null,
      el("th", { scope: "row" }, name),
      el("td", { class: "soft" }, parameter?.shape.join(" × ") || "scalar"),
      el("td", null, canvas),
      cell,
      el("td", { class: "mono" }, Number.isFinite(finding.min) ? measured(finding.min) : "–"),
      el("td", { class: "mono" }, Number.isFinite(finding.max) ? measured(finding.max) : "–"),
      el("td", null, finding.reason && el("span", { class: `chip ${finding.tone}` }, finding.reason)),
    );
    this.lines.push({ row: finding.row, cell, line, name: finding.name });
    return line;
  }

  values() {
    if (!this.tile) return;
    const { step, to } = this.view.now;
    const bucket = nearest(this.tile, step ?? Math.ceil(to) - 1);
    if (bucket < 0) return;
    for (const { row, cell } of this.lines) {
      const text = cellText(this.tile, bucket, row);
      if (cell.textContent !== text) cell.textContent = text;
    }
  }

  chosen() {
    for (const { line, name } of this.lines) line.classList.toggle("chosen", name === this.view.now.parameter);
  }
}
