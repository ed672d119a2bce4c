// The order and the states of alerts, and the limits of their rules on charts.

import { CHART_LIMITS } from "./generated/chart-limits.js";

/** @typedef {import("./api.js").Alert} Alert */
/** @typedef {{rule: string, limit: number}} Limit */

const ORDER = { firing: 0, pending: 1, resolved: 2 };

/**
 * Sort alerts: firing before pending before resolved, critical before warning, newer before older.
 * @param {Alert[]} alerts
 */
export function sortAlerts(alerts) {
  return [...alerts].sort(
    (a, b) => ORDER[a.state] - ORDER[b.state] || a.severity.localeCompare(b.severity) || b.first_at - a.first_at,
  );
}

/** Return whether an alert was resolved only because its run ended. @param {Alert} alert */
export const endedWithRun = ({ state, resolution }) =>
  state === "resolved" && Boolean(resolution?.startsWith("the run has ended"));

/** Return whether an alert was resolved because its cause is gone. @param {Alert} alert */
export const recovered = (alert) => alert.state === "resolved" && !endedWithRun(alert);

/** Return the state of an alert in words. @param {Alert} alert */
export const stateText = (alert) => (endedWithRun(alert) ? "ended with the alert on" : alert.state);

/**
 * Return the statistic that a rule judged and its limit there; null if no statistic is drawn in the limit's unit.
 * A rule has several conditions; the evidence shows which one held.
 * @param {Alert} alert @param {number} limit @param {number} elements of the parameter
 * @returns {{statistic: string, limit: number} | null}
 */
function limitedStatistic({ rule, evidence }, limit, elements) {
  const judged = CHART_LIMITS[rule]?.find((each) => each.evidence in evidence);
  return judged ? { statistic: judged.statistic, limit: judged.of_rms ? limit * Math.sqrt(elements) : limit } : null;
}

/**
 * Return the limits to draw on the series of a parameter, one for each rule.
 * @param {Alert[]} alerts @param {string | null} parameter @param {string} statistic @param {number} elements
 * @returns {Limit[]}
 */
export function chartLimits(alerts, parameter, statistic, elements) {
  /** @type {Map<string, Limit>} */
  const limits = new Map();
  for (const alert of alerts) {
    const blame = alert.parameters.find(({ name }) => name === parameter);
    const found = blame && limitedStatistic(alert, Number(blame.limit), elements);
    if (found?.statistic !== statistic || !(found.limit > 0) || !Number.isFinite(found.limit)) continue;
    if (!limits.has(alert.rule)) limits.set(alert.rule, { rule: alert.rule, limit: found.limit });
  }
  return [...limits.values()];
}
