// From a tile to pixels. Where cells share a pixel, the more conspicuous one is drawn: no spike and no NaN is lost.

import { HIGHEST, INFINITE, LOWEST, MISSING, NOTHING, NOT_A_NUMBER, PIXELS, rank } from "../colours.js";

/**
 * @typedef {import("../../data/tile.js").Tile} Tile
 * @typedef {"max" | "min" | "last"} Cell which value of a bucket is drawn
 * @typedef {{tile: Tile, ranks: Uint16Array, flip: boolean}} Ranked shape (buckets, rows)
 */

/**
 * Rank every cell once; drawing then only compares.
 * @param {Tile} tile @param {Cell} cell @param {{low: number, high: number}} scale
 * @returns {Ranked}
 */
export function ranked(tile, cell, scale) {
  const values = tile[cell];
  const ranks = new Uint16Array(values.length);
  const flip = cell === "min";
  for (let index = 0; index < values.length; index++) {
    let found = rank(values[index], scale);
    if (tile.nonfinite[index] && found < INFINITE) {
      found = Math.abs(tile.last[index]) === Infinity ? INFINITE : NOT_A_NUMBER;
    }
    ranks[index] = flip && found >= LOWEST && found <= HIGHEST ? LOWEST + HIGHEST - found : found;
  }
  return { tile, ranks, flip };
}

/**
 * Draw a range of steps into pixels.
 * @param {Ranked} source @param {ImageData} image its height is at most the number of parameters
 * @param {number} from first step at the left edge @param {number} to step at the right edge, exclusive
 * @param {[number, number]} missing pixels of a missing gradient: ground and stripe
 */
export function rasterise({ tile, ranks, flip }, image, from, to, missing) {
  const { width, height } = image;
  const pixels = new Uint32Array(image.data.buffer);
  const column = new Uint16Array(height);
  const rowOf = rowsToPixels(tile.rows, height);
  let previous = -1;
  let first = 0;
  for (let x = 0; x < width; x++) {
    const left = from + ((to - from) * x) / width;
    const right = from + ((to - from) * (x + 1)) / width;
    while (first < tile.steps.length && tile.ends[first] <= left) first++;
    let past = first;
    while (past < tile.steps.length && tile.steps[past] < right) past++;
    const same = past - first === 1 ? first : -1;
    if (same === -1 || same !== previous) collect(tile.rows, ranks, first, past, rowOf, column);
    previous = same;
    for (let y = 0; y < height; y++) {
      const found = column[y];
      const shown = flip && found >= LOWEST && found <= HIGHEST ? LOWEST + HIGHEST - found : found;
      pixels[y * width + x] = found === NOTHING ? 0 : found === MISSING ? missing[x % 5 === 0 ? 1 : 0] : PIXELS[shown];
    }
  }
}

/** @param {number} rows @param {number} height */
function rowsToPixels(rows, height) {
  return Uint16Array.from({ length: rows }, (_, row) => Math.floor((row * height) / rows));
}

/**
 * @param {number} rows @param {Uint16Array} ranks @param {number} first @param {number} past
 * @param {Uint16Array} rowOf @param {Uint16Array} column
 */
function collect(rows, ranks, first, past, rowOf, column) {
  column.fill(past > first ? 0 : NOTHING);
  for (let bucket = first; bucket < past; bucket++) {
    const offset = bucket * rows;
    for (let row = 0; row < rows; row++) {
      const y = rowOf[row];
      if (ranks[offset + row] > column[y]) column[y] = ranks[offset + row];
    }
  }
}
