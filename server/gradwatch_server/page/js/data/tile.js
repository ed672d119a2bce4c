// A tile: buckets of samples x parameters, as the server packs them.

/**
 * @typedef {object} Tile
 * @property {string} statistic
 * @property {string[]} parameters in the order of depth
 * @property {number[]} steps first step of each bucket
 * @property {number[]} lastSteps last step of each bucket
 * @property {number[]} ends where each bucket ends on the axis, exclusive
 * @property {number} rows number of parameters
 * @property {Float32Array} max shape (buckets, rows)
 * @property {Float32Array} min shape (buckets, rows)
 * @property {Float32Array} last shape (buckets, rows)
 * @property {Uint16Array} nonfinite shape (buckets, rows)
 */

/** @param {ArrayBuffer} body @returns {Tile} */
export function decoded(body) {
  const length = new DataView(body).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 4, length)));
  const rows = header.parameters.length;
  const cells = header.steps.length * rows;
  const start = 4 + length;
  /** @param {number} index */
  const plane = (index) => new Float32Array(body, start + 4 * cells * index, cells);
  return {
    statistic: header.statistic,
    parameters: header.parameters,
    steps: header.steps,
    lastSteps: header.last_steps,
    ends: ends(header.steps, header.last_steps),
    rows,
    max: plane(0),
    min: plane(1),
    last: plane(2),
    nonfinite: new Uint16Array(body, start + 12 * cells, cells),
  };
}

/**
 * Each bucket reaches to the next one; over a real gap (no samples for long) it does not.
 * @param {number[]} steps @param {number[]} lastSteps
 */
function ends(steps, lastSteps) {
  const strides = steps
    .slice(1)
    .map((step, index) => step - lastSteps[index])
    .sort((a, b) => a - b);
  const usual = strides[strides.length >> 1] ?? 1;
  return steps.map((_, index) => {
    const own = lastSteps[index] + usual;
    const next = steps[index + 1];
    return next === undefined ? own : next - lastSteps[index] <= 4 * usual ? next : own;
  });
}

/** Index of the last bucket that begins at or before a step; -1 before the first. @param {Tile} tile @param {number} step */
export function bucketAt(tile, step) {
  let [low, high] = [0, tile.steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tile.steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The buckets that lie in a range of steps. @param {Tile} tile @param {{from: number, to: number}} range */
export function seenBuckets(tile, { from, to }) {
  const first = tile.lastSteps.findIndex((step) => step >= from);
  return { first: first < 0 ? tile.steps.length : first, past: bucketAt(tile, Math.ceil(to) - 1) + 1 };
}

/** Index of the bucket nearest to a step, or -1 where there is none. @param {Tile} tile @param {number} step */
export function nearest(tile, step) {
  const found = bucketAt(tile, step);
  return found < 0 && tile.steps.length ? 0 : found;
}

/**
 * The decades that the colours span: what nearly all finite values lie in, on whole decades, three at least.
 * @param {Tile} tile @returns {{low: number, high: number}}
 */
export function decades(tile) {
  /** @type {number[]} */
  const finite = [];
  const stride = Math.max(1, Math.floor(tile.last.length / 20_000));
  for (let cell = 0; cell < tile.last.length; cell += stride) {
    const value = tile.last[cell];
    if (value > 0 && Number.isFinite(value)) finite.push(Math.log10(value));
  }
  if (!finite.length) return { low: -6, high: 0 };
  finite.sort((a, b) => a - b);
  /** @param {number} share */
  const at = (share) => finite[Math.min(finite.length - 1, Math.floor(share * finite.length))];
  const high = Math.ceil(at(0.985) + 0.1);
  const low = Math.max(Math.floor(at(0.02)), high - 20);
  return low > high - 3 ? { low: high - 3, high } : { low, high };
}
