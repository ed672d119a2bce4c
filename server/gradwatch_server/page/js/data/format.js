// Numbers, steps and times as people read them.

const counts = new Intl.NumberFormat("en-US");

/** A whole number with separators. @param {number | null | undefined} value */
export function count(value) {
  return value === null || value === undefined ? "–" : counts.format(value);
}

/** So many of something. @param {number} number @param {string} one */
export const many = (number, one) => `${count(number)} ${one}${number === 1 ? "" : "s"}`;

/** A measured value in three digits; spelled ones stay as they are. @param {number | string | null | undefined} value */
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

/** How long ago. @param {number} at Unix seconds @param {number} [now] Unix seconds */
export function ago(at, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - at);
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

/** A moment, to the second. @param {number | null | undefined} at Unix seconds */
export function moment(at) {
  if (at === null || at === undefined) return "–";
  return new Date(at * 1000).toLocaleString("sv-SE");
}

/** A power of ten with a raised exponent. @param {number} exponent */
export function power(exponent) {
  if (exponent === 0) return "1";
  if (exponent === 1) return "10";
  return `10${String(exponent).replace(/[-\d]/g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)])}`;
}
