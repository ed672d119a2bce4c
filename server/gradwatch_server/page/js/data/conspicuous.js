// Ranks the parameters by how conspicuous they are, with a reason for each.
//
// The rule: not finite, then exactly zero, then farthest from the median in decades, missing last. /metrics applies it
// to the newest sample to choose the parameters that get series of their own. The page applies it to all visible
// samples, where a gradient that never came, a spike, and zeros in some of the samples rank in between.

import { percent, power, stepRange } from "./format.js";
import { MISSING } from "./tile.js";

/** @typedef {import("./tile.js").Tile} Tile */
/** @typedef {import("./tile.js").BucketRange} BucketRange */
/** @typedef {"" | "warning" | "critical"} Tone */
/**
 * @typedef {object} Finding one parameter over the visible steps
 * @property {number} row @property {string} name
 * @property {number} rank one of RANKS @property {number} weight the larger first within a rank
 * @property {string} reason empty: nothing is conspicuous @property {Tone} tone
 * @property {number} last newest value that was not missing; -1: all were
 * @property {number} min smallest finite value @property {number} max largest finite value
 */

/** A parameter with a larger rank is more conspicuous. */
const RANKS = { missing: 0, distance: 1, someZero: 2, spike: 3, zero: 4, neverMeasured: 5, nonfinite: 6 };

const SPIKE_RATIO = 30;
const FAR_DECADES = 2;
const SOME_ZERO_SHARE = 0.1;
const OFTEN_MISSING_SHARE = 0.5;

/**
 * Return a finding for every parameter, the most conspicuous first.
 * @param {Tile} tile @param {BucketRange} range @returns {Finding[]}
 */
export function findConspicuous(tile, range) {
  const findings = tile.parameters.map((name, row) => {
    const values = gather(tile, row, range);
    return { row, name, ...judge(values), last: values.last, min: values.min, max: values.max };
  });
  addDistances(findings);
  return findings.sort((a, b) => b.rank - a.rank || b.weight - a.weight || a.row - b.row);
}

/** Summarise the values of one parameter. @param {Tile} tile @param {number} row @param {BucketRange} range */
function gather(tile, row, { first, past }) {
  const buckets = past - first;
  const severalSamples = buckets > 1 || (buckets === 1 && tile.lastSteps[first] > tile.steps[first]);
  const found = { buckets, severalSamples, min: Infinity, max: -Infinity, last: MISSING, zeros: 0, missing: 0 };
  let [maxBucket, badBucket] = [-1, -1];
  const highs = [];
  for (let bucket = first; bucket < past; bucket++) {
    const cell = bucket * tile.rows + row;
    const high = tile.max[cell];
    if (tile.nonfinite[cell] && badBucket < 0) badBucket = bucket;
    if (!(tile.last[cell] <= MISSING)) found.last = tile.last[cell];
    if (high <= MISSING) found.missing++;
    else if (high === 0) found.zeros++;
    if (high < 0 || !Number.isFinite(high)) continue;
    highs.push(high);
    found.min = Math.min(found.min, tile.min[cell]);
    if (high > found.max) [found.max, maxBucket] = [high, bucket];
  }
  const median = highs.sort((a, b) => a - b)[highs.length >> 1] ?? 0;
  return {
    ...found,
    median,
    badBuckets: badBucket < 0 ? -1 : badBucket - first,
    maxAt: place(tile, maxBucket),
    badAt: place(tile, badBucket, true),
  };
}

/**
 * Return where the samples of a bucket lie, as text: a bucket of several tells only that it was one of them.
 * @param {Tile} tile @param {number} bucket @param {boolean} [onwards] whether it goes on from there
 */
function place({ steps, lastSteps }, bucket, onwards = false) {
  if (bucket < 0) return "";
  const range = stepRange(steps[bucket], lastSteps[bucket]);
  if (steps[bucket] === lastSteps[bucket]) return onwards ? `from ${range}` : `at ${range}`;
  return onwards ? `first in ${range}` : `in ${range}`;
}

/** Return the finding on one parameter, without comparing it to others. @param {ReturnType<typeof gather>} values */
function judge(values) {
  const { buckets, missing, zeros, max, median } = values;
  /** @param {number} rank @param {number} weight @param {string} reason @param {Tone} tone */
  const finding = (rank, weight, reason, tone) => ({ rank, weight, reason, tone });
  if (buckets === 0) return finding(RANKS.missing, 0, "", "");
  if (values.badBuckets >= 0)
    return finding(RANKS.nonfinite, -values.badBuckets, `not finite ${values.badAt}`, "critical");
  if (missing === buckets && values.severalSamples)
    return finding(RANKS.neverMeasured, 0, "never had a gradient", "warning");
  if (missing === buckets) return finding(RANKS.missing, 0, "missing", "");
  if (zeros === buckets - missing) return finding(RANKS.zero, 0, "always exactly zero", "warning");
  if (median > 0 && max / median > SPIKE_RATIO) {
    const times = Math.round(max / median).toLocaleString("en-US");
    return finding(RANKS.spike, max / median, `spike ×${times} ${values.maxAt}`, "warning");
  }
  if (zeros > buckets * SOME_ZERO_SHARE)
    return finding(RANKS.someZero, 0, `exactly zero in ${percent(zeros / buckets)} of the samples`, "warning");
  return finding(RANKS.distance, 0, missing > buckets * OFTEN_MISSING_SHARE ? "often missing" : "", "");
}

/**
 * Set the weight of findings to the distance of their newest value from the median of all, in decades.
 * @param {Finding[]} findings
 */
function addDistances(findings) {
  /** @param {Finding} finding */
  const measured = ({ last }) => last > 0 && Number.isFinite(last);
  const logs = findings
    .filter(measured)
    .map(({ last }) => Math.log10(last))
    .sort((a, b) => a - b);
  const median = ((logs[(logs.length - 1) >> 1] ?? 0) + (logs[logs.length >> 1] ?? 0)) / 2;
  for (const finding of findings) {
    if (finding.rank > RANKS.someZero || !measured(finding)) continue;
    const decades = Math.log10(finding.last) - median;
    finding.weight = Math.abs(decades);
    if (finding.reason !== "" || finding.weight <= FAR_DECADES) continue;
    const side = decades < 0 ? "below" : "above";
    finding.reason = `${power(Math.round(finding.weight))} ${side} the median`;
    finding.tone = "warning";
  }
}
