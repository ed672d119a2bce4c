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
 * @param {{width: number, height: number}} least size at which what is not finite is drawn, in pixels of the image
 */
export function rasterise(source, image, from, to, missing, least) {
  const { width, height } = image;
  const grid = new Uint16Array(width * height);
  fillGrid(source, grid, width, height, from, to);
  widenSamples(grid, width, height, least.width);
  if (grid.some(isBad)) {
    enlargeBad(grid, { lines: height, line: width, length: width, stride: 1 }, least.width);
    enlargeBad(grid, { lines: width, line: 1, length: height, stride: width }, least.height);
  }
  const pixels = new Uint32Array(image.data.buffer);
  for (let at = 0; at < grid.length; at++) {
    const index = grid[at];
    if (index === NO_SAMPLE) pixels[at] = 0;
    else if (index === NO_GRADIENT) pixels[at] = (at % width) % STRIPE_PIXELS ? missing.ground : missing.stripe;
    else pixels[at] = PALETTE[source.flipped ? flip(index) : index];
  }
}

/** @param {number} index */
const isBad = (index) => index === INFINITE || index === NOT_A_NUMBER;

/**
 * Fill a grid, shape (height, width), with the largest colour index of the buckets that each pixel shows.
 * @param {ColouredTile} source @param {Uint16Array} grid @param {number} width @param {number} height
 * @param {number} from @param {number} to
 */
function fillGrid({ tile, indices }, grid, width, height, from, to) {
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
    for (let y = 0; y < height; y++) grid[y * width + x] = column[y];
  }
}

/**
 * Widen samples that stand alone, with steps without samples on both sides, to a width that is seen.
 * @param {Uint16Array} grid @param {number} width @param {number} height @param {number} least
 */
function widenSamples(grid, width, height, least) {
  const empty = Uint8Array.from({ length: width }, (_, x) => Number(grid[x] === NO_SAMPLE));
  /** @param {number} x @param {number} from */
  const copy = (x, from) => {
    for (let y = 0; y < height; y++) grid[y * width + x] = grid[y * width + from];
  };
  for (let first = 0; first < width; first++) {
    if (empty[first]) continue;
    let past = first + 1;
    while (past < width && !empty[past]) past++;
    let wanted = least - (past - first);
    for (let x = past; wanted > 0 && x < width && empty[x]; x++, wanted--) copy(x, past - 1);
    for (let x = first - 1; wanted > 0 && x >= 0 && empty[x]; x--, wanted--) copy(x, first);
    first = past;
  }
}

/**
 * Make every run of pixels along a line that are not finite at least so long: a single bad cell among millions is seen.
 * @param {Uint16Array} grid
 * @param {{lines: number, line: number, length: number, stride: number}} layout of the lines: their number, the
 *   distance from one to the next, their length, the distance from a pixel to the next
 * @param {number} least
 */
function enlargeBad(grid, { lines, line, length, stride }, least) {
  if (least < 2) return;
  for (let number = 0; number < lines; number++) {
    const start = number * line;
    for (let at = 0; at < length; at++) {
      const index = grid[start + at * stride];
      if (!isBad(index)) continue;
      let past = at + 1;
      while (past < length && isBad(grid[start + past * stride])) past++;
      const more = Math.max(0, least - (past - at));
      const first = Math.max(0, Math.min(at - (more >> 1), length - least));
      const end = more ? Math.min(length, first + least) : past;
      for (let each = first; each < end; each++) {
        const place = start + each * stride;
        if (!isBad(grid[place])) grid[place] = index;
      }
      at = end - 1;
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
