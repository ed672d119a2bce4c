// The layer x step map: depth downwards, steps to the right, the value as the colour.

import { recovered } from "../../data/alerts.js";
import { FONT, oncePerFrame, onThemeChange, prepareCanvas, themeColour } from "../../dom/canvas.js";
import { rangeChanged } from "../../data/viewport.js";
import { el } from "../../dom/elements.js";
import { ALERT_LANE, AXIS, crosshairX, drawAxis, frame, plotWidth, toX } from "../axis.js";
import { parsePixel } from "../colours.js";
import { hatch } from "./hatch.js";
import { listenToPointer } from "../pointer.js";
import { listenToKeyboard } from "./keyboard.js";
import { drawLabels } from "./labels.js";
import { colourTile, rasterise } from "./raster.js";

/** @typedef {import("../../data/tile.js").Tile} Tile */
/** @typedef {import("../../data/tile.js").Decades} Decades */
/** @typedef {import("../../data/viewport.js").Viewport} Viewport */
/** @typedef {import("../../data/viewport.js").ViewportState} ViewportState */
/** @typedef {import("../../data/api.js").Alert} Alert */

const ROW_PIXELS = 14;
const LEAST_PIXELS = 4; // width and height of a cell that is not finite
const NARROWEST_GAP = 2;
const KEYS = "Arrow keys move the crosshair, plus and minus zoom, 0 shows the whole run.";

/** Its box dispatches "sized" when the map has another size. */
export class LayerMap {
  /**
   * @param {Viewport} viewport @param {number} [fixedHeight] of the cells; without it, it depends on the screen
   */
  constructor(viewport, fixedHeight) {
    this.viewport = viewport;
    this.fixedHeight = fixedHeight;
    /** @type {Tile | null} */
    this.tile = null;
    /** @type {import("./raster.js").ColouredTile | null} */
    this.coloured = null;
    /** @type {Decades} */
    this.decades = { low: -6, high: 0 };
    /** @type {Alert[]} */
    this.alerts = [];
    this.size = { width: 0, height: 0 };
    /** Called with the row under the pointer, -1 when it has left. @type {(row: number) => void} */
    this.hovered = () => undefined;

    this.base = el("canvas", { class: "base", "aria-hidden": "true" });
    this.over = el("canvas", {
      class: "over",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "layer by step map",
      "aria-label": `Layer by step map. ${KEYS}`,
    });
    this.note = el("p", { class: "map-note", role: "status", hidden: true });
    this.box = el("div", { class: "map" }, this.base, this.over, this.note);
    this.cells = document.createElement("canvas");
    this.draw = oncePerFrame(() => this.drawBase());
    this.redrawCrosshair = oncePerFrame(() => this.drawOver());
    new ResizeObserver(([entry]) => this.resize(entry.contentRect.width)).observe(this.box);
    onThemeChange(this.box, () => this.drawBase());
    viewport.subscribe((state, before) => this.follow(state, before));
    listenToPointer(this.over, viewport, () => this.frame, {
      hover: (event) => this.hovered(event ? this.rowAt(event) : -1),
      click: (event) => this.choose(this.rowAt(event)),
    });
    listenToKeyboard(this);
  }

  /** @param {MouseEvent} event */
  rowAt(event) {
    return Math.floor((event.clientY - this.over.getBoundingClientRect().top - ALERT_LANE) / this.rowHeight);
  }

  /** @param {number} row */
  choose(row) {
    this.viewport.set({ parameter: this.tile?.parameters[row] ?? this.viewport.state.parameter });
  }

  get frame() {
    return frame(this.size.width);
  }

  get cellsHeight() {
    return this.size.height - ALERT_LANE - AXIS;
  }

  get rowHeight() {
    return this.tile ? this.cellsHeight / Math.max(1, this.tile.rows) : 0;
  }

  /** @param {Tile} tile @param {Decades} decades that the colours span */
  show(tile, decades) {
    const otherRows = tile.rows !== this.tile?.rows;
    this.tile = tile;
    this.decades = decades;
    this.coloured = colourTile(tile, this.viewport.state.cell, decades);
    if (otherRows) this.resize(this.size.width);
    this.draw();
  }

  /** Say in words why there is nothing to see; "" where there is. @param {string} text */
  setNote(text) {
    this.note.hidden = text === "";
    if (this.note.textContent !== text) this.note.textContent = text;
  }

  /** @param {Alert[]} alerts to mark */
  setAlerts(alerts) {
    this.alerts = alerts;
    this.draw();
  }

  /** @param {number} width in CSS pixels */
  resize(width) {
    const wanted = Math.max((this.tile?.rows ?? 0) * ROW_PIXELS, 220);
    const cells = this.fixedHeight ?? Math.min(wanted, Math.max(260, Math.min(560, innerHeight * 0.56)));
    const height = ALERT_LANE + AXIS + Math.round(cells);
    this.box.style.height = `${height}px`;
    this.size = { width, height };
    this.draw();
    this.box.dispatchEvent(new Event("sized"));
  }

  /** Draw again after a change of the viewport. @param {ViewportState} state @param {ViewportState} before */
  follow(state, before) {
    const otherCell = state.cell !== before.cell;
    if (otherCell && this.tile) this.coloured = colourTile(this.tile, state.cell, this.decades);
    if (state.step !== before.step) this.redrawCrosshair();
    const marked = state.parameter !== before.parameter || state.alert !== before.alert;
    if (otherCell || marked || rangeChanged(state, before)) this.draw();
  }

  /** Draw all but the crosshair: cells, names, alerts, axis. */
  drawBase() {
    const { width, height } = this.size;
    if (!width) return;
    const context = prepareCanvas(this.base, width, height);
    const theme = { soft: themeColour("soft"), ink: themeColour("ink"), line: themeColour("line"), font: FONT };
    const { left } = this.frame;
    const { parameter } = this.viewport.state;
    context.fillStyle = themeColour("hover");
    context.fillRect(left, ALERT_LANE, plotWidth(this.frame), this.cellsHeight);
    if (this.tile && this.coloured) {
      this.drawCells(context);
      const chosen = parameter === null ? -1 : this.tile.parameters.indexOf(parameter);
      drawLabels(context, this.tile.parameters, ALERT_LANE, this.rowHeight, { left, chosen }, theme);
    }
    this.drawAlerts(context);
    drawAxis(context, this.frame, this.viewport.state, height - AXIS, theme);
    this.drawOver();
  }

  /** @param {CanvasRenderingContext2D} context */
  drawCells(context) {
    if (!this.coloured || !this.tile?.rows) return;
    const { from, to } = this.viewport.state;
    const [width, height] = [plotWidth(this.frame), this.cellsHeight];
    const scale = Math.max(1, window.devicePixelRatio || 1); // a smaller one would merge samples
    this.cells.width = Math.max(1, Math.round(width * scale));
    this.cells.height = Math.max(1, Math.min(this.tile.rows, Math.round(height * scale)));
    const surface = /** @type {CanvasRenderingContext2D} */ (this.cells.getContext("2d"));
    const image = surface.createImageData(this.cells.width, this.cells.height);
    const missing = { ground: parsePixel(themeColour("missing")), stripe: parsePixel(themeColour("missing-line")) };
    const least = {
      width: Math.round(LEAST_PIXELS * scale),
      height: Math.ceil((LEAST_PIXELS * this.cells.height) / height),
    };
    rasterise(this.coloured, image, from, to, missing, least);
    surface.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.cells, this.frame.left, ALERT_LANE, width, height);
    this.drawGaps(context);
  }

  /**
   * Mark the steps that were not sampled, over which the sample before them is drawn.
   * @param {CanvasRenderingContext2D} context
   */
  drawGaps(context) {
    const pattern = this.tile?.gaps.length ? context.createPattern(hatch(), "repeat") : null;
    if (!pattern) return;
    const { frame: box, viewport } = this;
    context.fillStyle = pattern;
    for (const { from, to } of this.tile?.gaps ?? []) {
      const left = Math.max(box.left, toX(box, viewport.state, from));
      const right = Math.min(box.width - box.right, toX(box, viewport.state, to));
      if (right - left >= NARROWEST_GAP) context.fillRect(left, ALERT_LANE, right - left, this.cellsHeight);
    }
  }

  /**
   * Draw each alert as a bar in the lane above the steps at which it held.
   * @param {CanvasRenderingContext2D} context
   */
  drawAlerts(context) {
    const box = this.frame;
    const { state } = this.viewport;
    for (const alert of this.alerts) {
      const left = Math.max(box.left, toX(box, state, alert.first_step));
      const right = Math.min(box.width - box.right, toX(box, state, (alert.resolved_step ?? state.end) + 0.5));
      if (right < box.left || left > box.width - box.right) continue;
      context.fillStyle = themeColour(alert.severity === "critical" ? "bad" : "warn");
      context.globalAlpha = recovered(alert) ? 0.4 : 1;
      context.fillRect(left, 9, Math.max(2, right - left), 3);
      context.beginPath();
      context.moveTo(left - 5, 3);
      context.lineTo(left + 5, 3);
      context.lineTo(left, 13);
      context.fill();
      context.globalAlpha = 1;
      if (alert.id === state.alert) this.outlineEvidence(context, alert, left, Math.max(left + 4, right));
    }
  }

  /**
   * Outline the parameters that an alert blames.
   * @param {CanvasRenderingContext2D} context @param {Alert} alert @param {number} left @param {number} right
   */
  outlineEvidence(context, alert, left, right) {
    context.strokeStyle = themeColour("ink");
    context.lineWidth = 2;
    const blamed = new Set(alert.parameters.map(({ name }) => name));
    const names = this.tile?.parameters ?? [];
    for (let row = 0; row < names.length; row++) {
      const first = row;
      while (row < names.length && blamed.has(names[row])) row++;
      const height = Math.max(3, (row - first) * this.rowHeight);
      if (row > first) context.strokeRect(left, ALERT_LANE + first * this.rowHeight, right - left, height);
    }
    context.lineWidth = 1;
  }

  /** Draw the crosshair and the frame around the chosen parameter. */
  drawOver() {
    const { width, height } = this.size;
    if (!width) return;
    const context = prepareCanvas(this.over, width, height);
    const { from, to, step, parameter } = this.viewport.state;
    const row = parameter === null ? -1 : (this.tile?.parameters.indexOf(parameter) ?? -1);
    if (row >= 0) {
      const y = ALERT_LANE + row * this.rowHeight;
      context.strokeStyle = themeColour("ink");
      context.strokeRect(this.frame.left - 0.5, y - 0.5, plotWidth(this.frame) + 1, this.rowHeight + 1);
    }
    if (step === null || step < from || step >= to) return;
    const x = Math.round(crosshairX(this.frame, this.viewport.state, step)) + 0.5;
    drawVertical(context, x, height - AXIS, "rgb(0 0 0 / 55%)", 3);
    drawVertical(context, x, height - AXIS, "#ffffff", 1);
  }
}

/**
 * @param {CanvasRenderingContext2D} context @param {number} x @param {number} bottom @param {string} colour
 * @param {number} width
 */
function drawVertical(context, x, bottom, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(x, ALERT_LANE);
  context.lineTo(x, bottom);
  context.stroke();
}
