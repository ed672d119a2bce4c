// Loads the map's tiles: each reaches a little beyond the visible range, so that panning has something to show.

import * as api from "./api.js";
import { isStatistic, NEEDS } from "./statistics.js";
import { decodeTile, findDecades } from "./tile.js";
import { rangeChanged } from "./viewport.js";

/** @typedef {import("./viewport.js").Viewport} Viewport */
/** @typedef {import("./tile.js").Tile} Tile */
/** @typedef {import("./tile.js").Decades} Decades */
/** @typedef {{error: unknown, again: boolean}} Failure again: whether the tile will be asked for again */

const MARGIN = 0.5;
const SETTLE_MS = 90;
const MOST_CELLS = 2_000_000;
const FEWEST_POINTS = 50;

/** Dispatches "tile" when a new tile has arrived, and "failed" (detail: Failure) when none has. */
export class TileSource extends EventTarget {
  /**
   * @param {string} runId @param {Viewport} viewport @param {number} rows parameters of the run
   * @param {() => number} width returns the map's width in device pixels
   */
  constructor(runId, viewport, rows, width) {
    super();
    this.runId = runId;
    this.viewport = viewport;
    this.width = width;
    this.mostPoints = Math.floor(MOST_CELLS / Math.max(1, rows));
    /** @type {Tile | null} */
    this.tile = null;
    /** @type {Decades} */
    this.decades = { low: -6, high: 0 };
    this.decadesOf = "";
    this.covered = { from: 0, to: 0, width: 0 };
    /** @type {AbortController | null} */
    this.request = null;
    this.timer = 0;
    this.retry = new api.Retry(() => this.request || this.load());
    this.stale = false;
    viewport.subscribe((state, before) => {
      if (state.statistic !== before.statistic) this.load();
      // New samples at the end do not shorten the pause after a failure; a range that the reader chooses does.
      else if (this.retry.pending && state.following && state.to !== before.to) return;
      else if (rangeChanged(state, before)) this.schedule();
    });
  }

  /** Load soon if the visible range is no longer well covered; while it moves, one tile at a time. */
  schedule() {
    this.timer ||= window.setTimeout(() => {
      this.timer = 0;
      if (!this.request && this.insufficient()) this.load();
    }, SETTLE_MS);
  }

  /** Return whether the tile leaves out visible steps, or is too coarse or too fine for them. */
  insufficient() {
    const { from, to, end } = this.viewport.state;
    const { covered } = this;
    const inside = covered.from <= Math.max(0, from) && covered.to >= Math.min(end, to);
    const width = to - from;
    return this.stale || !inside || width < covered.width * 0.67 || width > covered.width * 1.5;
  }

  /**
   * Return why the tile shows nothing, in words; "" if it holds samples.
   * @param {import("./api.js").Run} run
   */
  emptiness({ sample_count: samples, state }) {
    const { tile, covered } = this;
    if (!tile || tile.steps.length) return "";
    if (!samples) return state === "finished" ? "This run ended without a sample" : "Waiting for the first sample";
    if (covered.from > 0 || covered.to < this.viewport.state.end) return "Not measured in these steps";
    const need = isStatistic(tile.statistic) ? NEEDS[tile.statistic] : undefined;
    return need ? `Not measured in this run: ${need}` : "Not measured in this run";
  }

  /**
   * Load again if the run's new samples belong to the tile, unless the next attempt after a failure is due later.
   * @returns {Promise<void>}
   */
  renew() {
    const { to, end } = this.viewport.state;
    this.stale ||= to >= this.covered.to || to >= end;
    return this.stale && !this.request && !this.retry.pending ? this.load() : Promise.resolve();
  }

  async load() {
    this.request?.abort();
    this.retry.cancel();
    const request = new AbortController();
    this.request = request;
    this.stale = false;
    const { from, to, end, statistic } = this.viewport.state;
    const width = to - from;
    const first = Math.max(0, Math.floor(from - width * MARGIN));
    const last = Math.ceil(to + width * MARGIN);
    const share = (Math.min(last, end) - first) / width;
    const points = Math.max(FEWEST_POINTS, Math.min(this.mostPoints, Math.ceil(this.width() * share)));
    try {
      const query = { statistic, from_step: first, to_step: last, points };
      const tile = decodeTile(await api.tile(this.runId, query, request.signal));
      this.tile = tile;
      this.covered = { from: first, to: last, width };
      this.scaleColours(tile, statistic);
      this.request = null;
      this.retry.reset();
      this.dispatchEvent(new Event("tile"));
      if (this.insufficient()) this.load();
    } catch (error) {
      if (request.signal.aborted) return;
      this.request = null;
      this.stale = true;
      this.dispatchEvent(new CustomEvent("failed", { detail: { error, again: this.retry.schedule(error) } }));
    }
  }

  /** Choose the decades that the colours span. @param {Tile} tile @param {string} statistic */
  scaleColours(tile, statistic) {
    if (this.decadesOf !== statistic || !this.keepsColours(tile)) this.decades = findDecades(tile);
    this.decadesOf = tile.steps.length ? statistic : "";
  }

  /** Colours keep their meaning while zooming; only the whole run may change them. @param {Tile} tile */
  keepsColours(tile) {
    const { from, to, end } = this.viewport.state;
    if (from > 0 || to < end || !tile.steps.length) return true;
    const found = findDecades(tile);
    return found.low >= this.decades.low - 1 && found.high <= this.decades.high;
  }

  close() {
    clearTimeout(this.timer);
    this.retry.cancel();
    this.request?.abort();
  }
}

/** Return a "failed" event of a source in words. @param {Event} event */
export function notLoaded(event) {
  const { error, again } = /** @type {CustomEvent<Failure>} */ (event).detail;
  return `Not loaded${again ? ", trying again" : ""}: ${error instanceof Error ? error.message : error}`;
}
