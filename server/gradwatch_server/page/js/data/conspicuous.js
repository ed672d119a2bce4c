// Which parameters deserve a look first: a score and a reason, from what the map holds.

import { power } from "./format.js";

/** @typedef {import("./tile.js").Tile} Tile */
/**
 * @typedef {object} Finding
 * @property {number} row @property {string} name @property {number} score @property {string} reason
 * @property {"" | "warning" | "critical"} tone
 * @property {number} last @property {number} min @property {number} max @property {number} nonfinite
 */

const SPIKE = 30;
const FAR_DECADES = 2;

/** @typedef {{first: number, past: number}} Span buckets that are looked at */

/** The most conspicuous first. @param {Tile} tile @param {Span} span @returns {Finding[]} */
export function findings(tile, span) {
  const found = tile.parameters.map((name, row) => described(tile, name, row, span));
  const logs = found
    .filter(({ last }) => last > 0 && Number.isFinite(last))
    .map(({ last }) => Math.log10(last))
    .sort((a, b) => a - b);
  const centre = logs[logs.length >> 1] ?? 0;
  for (const each of found) {
    if (each.score >= 50 || !(each.last > 0)) continue;
    const away = Math.log10(each.last) - centre;
    each.score += Math.abs(away);
    if (each.reason === "" && Math.abs(away) > FAR_DECADES) {
      each.reason =
        away < 0 ? `${power(Math.round(-away))} below the median` : `${power(Math.round(away))} above the median`;
      each.tone = "warning";
    }
  }
  return found.sort((a, b) => b.score - a.score || a.row - b.row);
}

/** @param {Tile} tile @param {string} name @param {number} row @param {Span} span @returns {Finding} */
function described(tile, name, row, { first, past }) {
  let [min, max, nonfinite, badAt, badStep, spikeStep, zeros, missing] = [Infinity, -Infinity, 0, 0, -1, -1, 0, 0];
  const highs = [];
  let last = -1;
  for (let bucket = first; bucket < past; bucket++) {
    const cell = bucket * tile.rows + row;
    const [low, high] = [tile.min[cell], tile.max[cell]];
    if (tile.nonfinite[cell]) {
      nonfinite += tile.nonfinite[cell];
      if (badStep < 0) [badAt, badStep] = [bucket - first, tile.steps[bucket]];
    }
    if (tile.last[cell] !== -1) last = tile.last[cell];
    if (high === -1) missing++;
    else if (high === 0) zeros++;
    if (high < 0 || !Number.isFinite(high)) continue;
    highs.push(high);
    if (low < min) min = low;
    if (high > max) [max, spikeStep] = [high, tile.steps[bucket]];
  }
  const median = highs.sort((a, b) => a - b)[highs.length >> 1] ?? 0;
  const buckets = past - first;
  /** @param {number} score @param {string} reason @param {"" | "warning" | "critical"} tone @returns {Finding} */
  const says = (score, reason, tone) => ({ row, name, score, reason, tone, last, min, max, nonfinite });
  if (nonfinite) return says(200 - badAt / buckets, `not finite from step ${badStep}`, "critical");
  if (buckets > 0 && missing === buckets) return says(60, "never had a gradient", "warning");
  if (zeros === buckets - missing) return says(59, "always exactly zero", "warning");
  if (median > 0 && max / median > SPIKE)
    return says(
      50 + Math.log10(max / median),
      `spike ×${Math.round(max / median).toLocaleString("en-US")} at step ${spikeStep}`,
      "warning",
    );
  if (zeros > buckets / 10)
    return says(40, `exactly zero in ${Math.round((100 * zeros) / buckets)} % of the samples`, "warning");
  return says(0, missing > buckets / 2 ? "often missing" : "", "");
}
