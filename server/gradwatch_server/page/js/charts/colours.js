// The map's colours: viridis for finite values, and one distinct colour for each state that is not a number.
// Every cell has a rank; the larger rank is the more conspicuous one, so that sharing a pixel never hides it.

const VIRIDIS = [
  0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884, 0x44bf70, 0x7ad151, 0xbddf26, 0xfde725,
];
const SHADES = 240;

export const MISSING = 0;
export const ZERO = 1;
export const LOWEST = 2;
export const HIGHEST = LOWEST + SHADES - 1;
export const INFINITE = HIGHEST + 1;
export const NOT_A_NUMBER = INFINITE + 1;
/** For buckets without a sample at all. */
export const NOTHING = 0xffff;

/** Colours of the states, as CSS: apart from viridis and from each other for every kind of colour vision. Missing is striped grey, from the theme. */
export const STATES = { zero: "#000000", infinite: "#ff66ff", notANumber: "#b30000" };

/** @param {number} share 0 to 1 @returns {[number, number, number]} */
export function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = place - low;
  const [a, b] = [VIRIDIS[low], VIRIDIS[low + 1]];
  /** @param {number} shift */
  const mix = (shift) => Math.round(((a >> shift) & 255) * (1 - part) + ((b >> shift) & 255) * part);
  return [mix(16), mix(8), mix(0)];
}

/** @param {number} red @param {number} green @param {number} blue */
const pixel = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** @param {string} colour "#rrggbb" @returns {number} as a pixel */
export function parsed(colour) {
  const value = Number.parseInt(colour.slice(1), 16);
  return pixel(value >> 16, (value >> 8) & 255, value & 255);
}

/** Pixels (little-endian RGBA) by rank. */
export const PIXELS = (() => {
  const pixels = new Uint32Array(NOT_A_NUMBER + 1);
  pixels[MISSING] = 0;
  pixels[ZERO] = parsed(STATES.zero);
  for (let shade = 0; shade < SHADES; shade++) pixels[LOWEST + shade] = pixel(...viridis(shade / (SHADES - 1)));
  pixels[INFINITE] = parsed(STATES.infinite);
  pixels[NOT_A_NUMBER] = parsed(STATES.notANumber);
  return pixels;
})();

/**
 * The rank of one cell.
 * @param {number} value -1 where the gradient is missing
 * @param {{low: number, high: number}} scale decades
 */
export function rank(value, scale) {
  if (value === -1) return MISSING;
  if (value === 0) return ZERO;
  if (Number.isNaN(value)) return NOT_A_NUMBER;
  if (!Number.isFinite(value)) return INFINITE;
  const share = (Math.log10(value) - scale.low) / (scale.high - scale.low);
  return LOWEST + Math.round(Math.min(Math.max(share, 0), 1) * (SHADES - 1));
}
