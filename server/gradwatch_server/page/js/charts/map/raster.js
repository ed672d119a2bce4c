// Turns a tile into pixels. Where cells share a pixel, the largest colour index wins: no spike and no NaN is hidden.

import { colourIndex, HIGHEST, INFINITE, LOWEST, NO_GRADIENT, NO_SAMPLE, NOT_A_NUMBER, PALETTE } from "../colours.js";

/**
 * @typedef {import("../../data/tile.js").Tile} Tile
 * @typedef {import("../../data/viewport.js").Cell} Cell
 *
 * @typedef {object} ColouredTile
 * @property {Tile} tile
 * @property {Uint16Array} indices colour index of each cell, shape (buckets, rows)
 * @property {boolean} flipped whether the shades are in reverse order, so that small values win a shared pixel
 */

const STRIPE_PIXELS = 5;

/**
 * Find the colour of every cell once, so that drawing only compares.
 * @param {Tile} tile @param {Cell} cell @param {import("../../data/tile.js").Decades} decades
 * @returns {ColouredTile}
 */
export function colourTile(tile, cell, decades) {
  const values = tile[cell];
  const indices = new Uint16Array(values.length);
  const flipped = cell === "min";
  for (let at = 0; at < values.length; at++) {
    let index = colourIndex(values[at], decades);
    if (tile.nonfinite[at] && index < INFINITE) {
      index = Math.abs(tile.last[at]) === Infinity ? INFINITE : NOT_A_NUMBER;
    }
    indices[at] = flipped ? flip(index) : index;
  }
  return { tile, indices, flipped };
}

/** Reverse the order of the shades and leave the other states. @param {number} index */
const flip = (index) => (index >= LOWEST && index <= HIGHEST ? LOWEST + HIGHEST - index : index);

/**
 * Draw a range of steps into an image.
 * @param {ColouredTile} source @param {ImageData} image its height is at most the number of parameters
 * @param {number} from step at the left edge @param {number} to step at the right edge, exclusive
 * @param {{ground: number, stripe: number}} missing pixels of a missing gradient
 */
export function rasterise({ tile, indices, flipped }, image, from, to, missing) {
  const { width, height } = image;
  const pixels = new Uint32Array(image.data.buffer);
  const column = new Uint16Array(height);
  const pixelOfRow = Uint16Array.from({ length: tile.rows }, (_, row) => Math.floor((row * height) / tile.rows));
  let previous = -1;
  let first = 0;
  for (let x = 0; x < width; x++) {
    // 1. The buckets that this column of pixels shows.
    const left = from + ((to - from) * x) / width;
    const right = from + ((to - from) * (x + 1)) / width;
    while (first < tile.steps.length && tile.ends[first] <= left) first++;
    let past = first;
    while (past < tile.steps.length && tile.steps[past] < right) past++;
    // 2. Their largest index at each pixel, unless the column before showed the same single bucket.
    const single = past - first === 1 ? first : -1;
    if (single === -1 || single !== previous) collect(tile.rows, indices, first, past, pixelOfRow, column);
    previous = single;
    // 3. The pixels.
    const ofMissing = x % STRIPE_PIXELS === 0 ? missing.stripe : missing.ground;
    for (let y = 0; y < height; y++) {
      const index = column[y];
      if (index === NO_SAMPLE) pixels[y * width + x] = 0;
      else if (index === NO_GRADIENT) pixels[y * width + x] = ofMissing;
      else pixels[y * width + x] = PALETTE[flipped ? flip(index) : index];
    }
  }
}

/**
 * Fill a column with the largest index of some buckets at each pixel.
 * @param {number} rows @param {Uint16Array} indices @param {number} first @param {number} past
 * @param {Uint16Array} pixelOfRow @param {Uint16Array} column
 */
function collect(rows, indices, first, past, pixelOfRow, column) {
  column.fill(past > first ? 0 : NO_SAMPLE);
  for (let bucket = first; bucket < past; bucket++) {
    const offset = bucket * rows;
    for (let row = 0; row < rows; row++) {
      const y = pixelOfRow[row];
      if (indices[offset + row] > column[y]) column[y] = indices[offset + row];
    }
  }
}
