// Where the map's tiles come from: a little more than is seen, so that panning has something to show.

import * as api from "./api.js";
import { decades, decoded } from "./tile.js";

/** @typedef {import("./viewport.js").View} View @typedef {import("./tile.js").Tile} Tile */
/** @typedef {{low: number, high: number}} Scale */

const MARGIN = 0.5;
const SETTLE_MS = 90;
const MOST_CELLS = 2_000_000;

/** Fires "tile" when a new one has arrived and "refused" where it did not. */
export class TileSource extends EventTarget {
  /**
   * @param {string} runId @param {View} view @param {number} rows parameters of the run
   * @param {() => number} pixels how wide the map is, in device pixels
   */
  constructor(runId, view, rows, pixels) {
    super();
    this.most = Math.floor(MOST_CELLS / Math.max(1, rows));
    this.runId = runId;
    this.view = view;
    this.pixels = pixels;
    /** @type {Tile | null} */
    this.tile = null;
    /** @type {Scale} */
    this.scale = { low: -6, high: 0 };
    this.scaled = "";
    this.covered = { from: 0, to: 0, width: 0 };
    /** @type {AbortController | null} */
    this.asking = null;
    this.timer = 0;
    this.stale = false;
    view.subscribe((now, before) => {
      if (now.statistic !== before.statistic) this.load();
      else if (now.from !== before.from || now.to !== before.to) this.soon();
    });
  }

  /** Ask again when what is seen is not well covered: while it moves as well, one question at a time. */
  soon() {
    this.timer ||= window.setTimeout(() => {
      this.timer = 0;
      if (!this.asking && this.needed()) this.load();
    }, SETTLE_MS);
  }

  needed() {
    const { from, to, end } = this.view.now;
    const { covered } = this;
    const inside = covered.from <= Math.max(0, from) && covered.to >= Math.min(end, to);
    const width = to - from;
    return this.stale || !inside || width < covered.width * 0.67 || width > covered.width * 1.5;
  }

  /** The run has new samples. @returns {Promise<void>} */
  renew() {
    const { to, end } = this.view.now;
    this.stale ||= to >= this.covered.to || to >= end;
    return this.stale && !this.asking ? this.load() : Promise.resolve();
  }

  async load() {
    this.asking?.abort();
    const asking = new AbortController();
    this.asking = asking;
    this.stale = false;
    const { from, to, end, statistic } = this.view.now;
    const width = to - from;
    const first = Math.max(0, Math.floor(from - width * MARGIN));
    const last = Math.ceil(to + width * MARGIN);
    const share = (Math.min(last, end) - first) / width;
    const query = {
      statistic,
      from_step: first,
      to_step: last,
      points: Math.max(50, Math.min(this.most, Math.ceil(this.pixels() * share))),
    };
    try {
      const tile = decoded(await api.tile(this.runId, query, asking.signal));
      this.tile = tile;
      this.covered = { from: first, to: last, width };
      if (this.scaled !== statistic || !this.fixed(tile)) this.scale = decades(tile);
      this.scaled = tile.steps.length ? statistic : "";
      this.asking = null;
      this.dispatchEvent(new Event("tile"));
      if (this.needed()) this.load();
    } catch (error) {
      if (asking.signal.aborted) return;
      this.asking = null;
      this.dispatchEvent(new CustomEvent("refused", { detail: error }));
    }
  }

  /** Colours keep their meaning while zooming; only the whole run may change them. @param {Tile} tile */
  fixed(tile) {
    const { from, to, end } = this.view.now;
    if (from > 0 || to < end || !tile.steps.length) return true;
    const fresh = decades(tile);
    return fresh.low >= this.scale.low - 1 && fresh.high <= this.scale.high;
  }

  close() {
    clearTimeout(this.timer);
    this.asking?.abort();
  }
}
