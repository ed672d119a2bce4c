// Numbers, steps and times as text.

const counts = new Intl.NumberFormat("en-US");

/** Format a whole number with separators. @param {number | null | undefined} value */
export function count(value) {
  return value === null || value === undefined ? "–" : counts.format(value);
}

/** Format a number with its noun. @param {number} number @param {string} singular */
export const countOf = (number, singular) => `${count(number)} ${singular}${number === 1 ? "" : "s"}`;

/** List the numbers above zero, each with its noun. @param {Record<string, number>} numbers by noun */
export const countEach = (numbers) =>
  Object.entries(numbers)
    .filter(([, number]) => number > 0)
    .map(([noun, number]) => `${count(number)} ${noun}`)
    .join(", ");

/** Format a step or a range of steps. @param {number} first @param {number} last */
export const stepRange = (first, last) =>
  first >= last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`;

/**
 * Cut a long name in its middle: names differ at their ends.
 * @param {string} name @param {number} longest in characters
 */
export function shorten(name, longest) {
  const kept = (longest - 1) / 2;
  return name.length <= longest ? name : `${name.slice(0, Math.floor(kept))}…${name.slice(-Math.ceil(kept))}`;
}

/** Format a position as an ordinal: 1st, 2nd, 10th. @param {number} number */
export function ordinal(number) {
  const last = number % 10;
  const suffix = number % 100 > 10 && number % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][last] ?? "th");
  return `${count(number)}${suffix}`;
}

/**
 * Format a measured value with three digits; null is a missing one.
 * @param {number | string | null | undefined} value "NaN" and "Infinity" stay as they are
 */
export function measured(value) {
  if (value === null || value === undefined) return "missing";
  if (typeof value === "string") return value;
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Infinity" : "-Infinity";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

/** Format a share as a percentage. @param {number} share 0 to 1 */
export const percent = (share) =>
  share > 0 && share < 0.01 ? "under 1 %" : share < 1 && share > 0.99 ? "over 99 %" : `${Math.round(share * 100)} %`;

/** Format a power of ten with a raised exponent. @param {number} exponent */
export function power(exponent) {
  if (exponent === 0) return "1";
  if (exponent === 1) return "10";
  return `10${String(exponent).replace(/[-\d]/g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)])}`;
}

/** Format the time since a moment. @param {number} at Unix seconds @param {number} [now] Unix seconds */
export function ago(at, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - at);
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

/** Format a moment as local date and time, to the second. @param {number | null | undefined} at Unix seconds */
export function moment(at) {
  if (at === null || at === undefined) return "–";
  return new Date(at * 1000).toLocaleString("sv-SE");
}
