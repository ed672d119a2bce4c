// The layer x step map: depth downwards, steps to the right, colour is the value.

import { heldToTheEnd } from "../../pages/alerts.js";
import { AXIS, drawAxis, frame, LANE, toX } from "../axis.js";
import { parsed } from "../colours.js";
import { el, fitted, onceAFrame, themed, whenThemed } from "../../dom/elements.js";
import { listen } from "./keyboard.js";
import { drawLabels } from "./labels.js";
import { ranked, rasterise } from "./raster.js";
import { steer } from "../pointer.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */
/** @typedef {import("../../data/viewport.js").View} View */
/** @typedef {{low: number, high: number}} Scale */
/** @typedef {import("../../data/api.js").Alert} Alert */

const FONT = "12px system-ui, sans-serif";

export class LayerMap {
  /** @param {View} view @param {number} [least] height of the cells, at least */
  constructor(view, least = 220) {
    this.view = view;
    this.least = least;
    /** @type {Tile | null} */
    this.tile = null;
    /** @type {import("./raster.js").Ranked | null} */
    this.source = null;
    /** @type {Scale} */
    this.scale = { low: -6, high: 0 };
    /** @type {Alert[]} */
    this.alerts = [];
    this.base = el("canvas", { class: "base", "aria-hidden": "true" });
    this.over = el("canvas", {
      class: "over",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "layer by step map",
      "aria-label": "Layer by step map. Arrow keys move the crosshair, plus and minus zoom, 0 shows the whole run.",
    });
    this.box = el("div", { class: "map" }, this.base, this.over);
    this.bitmap = document.createElement("canvas");
    this.draw = onceAFrame(() => this.paint());
    this.drawOver = onceAFrame(() => this.paintOver());
    this.size = { width: 0, height: 0 };
    new ResizeObserver(([entry]) => this.resized(entry.contentRect.width)).observe(this.box);
    whenThemed(this.box, () => this.draw());
    view.subscribe((now, before) => this.moved(now, before));
    /** @type {(row: number) => void} */
    this.hovered = () => undefined;
    steer(this.over, view, () => this.frame, {
      hover: (event) => this.hovered(event ? this.rowAt(event) : -1),
      click: (event) => view.set({ parameter: this.tile?.parameters[this.rowAt(event)] ?? view.now.parameter }),
    });
    listen(this);
  }

  /** @param {MouseEvent} event */
  rowAt(event) {
    return Math.floor((event.clientY - this.over.getBoundingClientRect().top - LANE) / this.rowHeight);
  }

  get frame() {
    return frame(this.size.width);
  }

  get rowHeight() {
    return this.tile ? (this.size.height - LANE - AXIS) / Math.max(1, this.tile.rows) : 0;
  }

  /** @param {Tile} tile @param {Scale} scale */
  show(tile, scale) {
    const grown = tile.rows !== this.tile?.rows;
    this.tile = tile;
    this.scale = scale;
    this.source = ranked(tile, this.view.now.cell, scale);
    if (grown) this.resized(this.size.width);
    this.draw();
  }

  /** @param {Alert[]} alerts */
  mark(alerts) {
    this.alerts = alerts;
    this.draw();
  }

  /** @param {number} width */
  resized(width) {
    const rows = this.tile?.rows ?? 0;
    const most = this.least < 220 ? this.least : Math.max(260, Math.min(560, innerHeight * 0.56));
    const height = LANE + AXIS + Math.round(Math.min(Math.max(rows * 14, this.least), most));
    this.box.style.height = `${height}px`;
    this.size = { width, height };
    this.draw();
    this.box.dispatchEvent(new CustomEvent("sized", { detail: this.size }));
  }

  /** @param {import("../../data/viewport.js").Looking} now @param {import("../../data/viewport.js").Looking} before */
  moved(now, before) {
    if (now.cell !== before.cell && this.tile) this.source = ranked(this.tile, now.cell, this.scale);
    if (now.step !== before.step) this.drawOver();
    if (now.from !== before.from || now.to !== before.to || now.cell !== before.cell) this.draw();
    if (now.parameter !== before.parameter || now.alert !== before.alert) this.draw();
  }

  paint() {
    const { width, height } = this.size;
    if (!width) return;
    const context = fitted(this.base, width, height);
    const theme = { soft: themed("soft"), ink: themed("ink"), line: themed("line"), font: FONT };
    const box = this.frame;
    const plot = { width: width - box.left - box.right, height: height - LANE - AXIS };
    context.fillStyle = themed("hover");
    context.fillRect(box.left, LANE, plot.width, plot.height);
    if (this.tile && this.source) {
      this.paintCells(context, box.left, plot);
      const chosen = this.view.now.parameter === null ? -1 : this.tile.parameters.indexOf(this.view.now.parameter);
      drawLabels(context, this.tile.parameters, LANE, this.rowHeight, { left: box.left, chosen }, theme);
    }
    this.paintAlerts(context);
    drawAxis(context, box, this.view.now, height - AXIS, theme);
    this.paintOver();
  }

  /** @param {CanvasRenderingContext2D} context @param {number} left @param {{width: number, height: number}} plot */
  paintCells(context, left, plot) {
    if (!this.source || !this.tile?.rows) return;
    const scale = window.devicePixelRatio || 1;
    const wide = Math.max(1, Math.round(plot.width * scale));
    const high = Math.max(1, Math.min(this.tile.rows, Math.round(plot.height * scale)));
    this.bitmap.width = wide;
    this.bitmap.height = high;
    const surface = /** @type {CanvasRenderingContext2D} */ (this.bitmap.getContext("2d"));
    const image = surface.createImageData(wide, high);
    rasterise(this.source, image, this.view.now.from, this.view.now.to, [
      parsed(themed("missing")),
      parsed(themed("missing-line")),
    ]);
    surface.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.bitmap, left, LANE, plot.width, plot.height);
  }

  /** Alerts as bars on the lane above the steps at which they held. @param {CanvasRenderingContext2D} context */
  paintAlerts(context) {
    const box = this.frame;
    const { now } = this.view;
    for (const alert of this.alerts) {
      const left = Math.max(box.left, toX(box, now, alert.first_step));
      const right = Math.min(box.width - box.right, toX(box, now, (alert.resolved_step ?? now.end) + 0.5));
      if (right < box.left || left > box.width - box.right) continue;
      context.fillStyle = themed(alert.severity === "critical" ? "bad" : "warn");
      context.globalAlpha = alert.state === "resolved" && !heldToTheEnd(alert) ? 0.4 : 1;
      context.fillRect(left, 9, Math.max(2, right - left), 3);
      context.beginPath();
      context.moveTo(left - 5, 3);
      context.lineTo(left + 5, 3);
      context.lineTo(left, 13);
      context.fill();
      context.globalAlpha = 1;
      if (alert.id === now.alert) this.outline(context, alert, left, Math.max(left + 4, right));
    }
  }

  /** Draw an alert's evidence: its parameters over the steps at which it held. @param {CanvasRenderingContext2D} context @param {Alert} alert @param {number} left @param {number} right */
  outline(context, alert, left, right) {
    context.strokeStyle = themed("ink");
    context.lineWidth = 2;
    const names = new Set(alert.parameters.map(({ name }) => name));
    const rows = this.tile?.parameters ?? [];
    for (let row = 0; row < rows.length; row++) {
      const first = row;
      while (row < rows.length && names.has(rows[row])) row++;
      if (row > first)
        context.strokeRect(
          left,
          LANE + first * this.rowHeight,
          right - left,
          Math.max(3, (row - first) * this.rowHeight),
        );
    }
    context.lineWidth = 1;
  }

  paintOver() {
    const { width, height } = this.size;
    if (!width) return;
    const context = fitted(this.over, width, height);
    const { now } = this.view;
    const box = this.frame;
    if (this.tile && now.parameter !== null) {
      const row = this.tile.parameters.indexOf(now.parameter);
      const y = LANE + row * this.rowHeight;
      context.strokeStyle = themed("ink");
      if (row >= 0)
        context.strokeRect(box.left - 0.5, y - 0.5, box.width - box.left - box.right + 1, this.rowHeight + 1);
    }
    if (now.step === null || now.step < now.from || now.step >= now.to) return;
    const x = Math.round(toX(box, now, now.step + Math.min(0.5, (now.to - now.from) / 40))) + 0.5;
    for (const [colour, wide] of /** @type {[string, number][]} */ ([
      ["rgb(0 0 0 / 55%)", 3],
      ["#ffffff", 1],
    ])) {
      context.strokeStyle = colour;
      context.lineWidth = wide;
      context.beginPath();
      context.moveTo(x, LANE);
      context.lineTo(x, height - AXIS);
      context.stroke();
    }
  }
}
