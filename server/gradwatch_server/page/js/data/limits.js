// Where the limit of a rule lies on a chart of the parameter that it blames.

/** @typedef {import("./api.js").Alert} Alert */
/** @typedef {{rule: string, limit: number}} Limit */

/**
 * Which statistic a rule has judged, and what its limit is there: told by its evidence, since a rule has several signs.
 * @param {Alert} alert @param {number} limit @param {number} elements of the parameter
 * @returns {{statistic: string, limit: number} | null} null: its limit is of no statistic that is drawn
 */
function placed({ rule, evidence }, limit, elements) {
  if (rule === "throttled") return { statistic: "clipped_unit_share", limit };
  if ("median_ratio" in evidence || "amplification_decades" in evidence) return { statistic: "ratio", limit };
  // The gradient of a deep layer against that of the output, per element.
  if ("attenuation_decades" in evidence) return { statistic: "grad_norm", limit: limit * Math.sqrt(elements) };
  return null;
}

/**
 * The limits to draw across a series, each once.
 * @param {Alert[]} alerts @param {string | null} parameter @param {string} statistic @param {number} elements
 * @returns {Limit[]}
 */
export function limitsOf(alerts, parameter, statistic, elements) {
  /** @type {Map<string, Limit>} */
  const found = new Map();
  for (const alert of alerts) {
    const blame = alert.parameters.find(({ name }) => name === parameter);
    const place = blame && placed(alert, Number(blame.limit), elements);
    if (place?.statistic !== statistic || !(place.limit > 0) || !Number.isFinite(place.limit)) continue;
    if (!found.has(alert.rule)) found.set(alert.rule, { rule: alert.rule, limit: place.limit });
  }
  return [...found.values()];
}
