// The map's colours: viridis for finite values, one distinct colour for every other state.
//
// A cell's colour is an index into PALETTE. Where cells share a pixel, the largest index is drawn: NaN over infinity
// over large values over small values over zero over missing.

import { MISSING } from "../data/tile.js";

const VIRIDIS = [
  0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884, 0x44bf70, 0x7ad151, 0xbddf26, 0xfde725,
];
const SHADES = 240;

/** Indices into PALETTE; finite values lie from LOWEST to HIGHEST. */
export const NO_GRADIENT = 0;
export const ZERO = 1;
export const LOWEST = 2;
export const HIGHEST = LOWEST + SHADES - 1;
export const INFINITE = HIGHEST + 1;
export const NOT_A_NUMBER = INFINITE + 1;
/** Stands for a pixel without any sample. */
export const NO_SAMPLE = 0xffff;

/**
 * CSS colours that differ from viridis and from each other for every kind of colour vision. Missing is striped grey,
 * from the theme.
 */
export const STATES = { zero: "#000000", infinite: "#ff66ff", notANumber: "#b30000" };

/** @param {number} share 0 to 1 @returns {[number, number, number]} red, green, blue */
export function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = place - low;
  const [a, b] = [VIRIDIS[low], VIRIDIS[low + 1]];
  /** @param {number} shift */
  const mix = (shift) => Math.round(((a >> shift) & 255) * (1 - part) + ((b >> shift) & 255) * part);
  return [mix(16), mix(8), mix(0)];
}

/** Return a pixel: little-endian RGBA. @param {number} red @param {number} green @param {number} blue */
const pixel = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** @param {string} colour "#rrggbb" @returns {number} pixel */
export function parsePixel(colour) {
  const value = Number.parseInt(colour.slice(1), 16);
  return pixel(value >> 16, (value >> 8) & 255, value & 255);
}

/** Pixels by colour index. */
export const PALETTE = (() => {
  const pixels = new Uint32Array(NOT_A_NUMBER + 1);
  pixels[ZERO] = parsePixel(STATES.zero);
  for (let shade = 0; shade < SHADES; shade++) pixels[LOWEST + shade] = pixel(...viridis(shade / (SHADES - 1)));
  pixels[INFINITE] = parsePixel(STATES.infinite);
  pixels[NOT_A_NUMBER] = parsePixel(STATES.notANumber);
  return pixels;
})();

/**
 * Return the colour index of a value.
 * @param {number} value @param {import("../data/tile.js").Decades} decades that the shades span
 */
export function colourIndex(value, decades) {
  if (value <= MISSING) return NO_GRADIENT;
  if (value === 0) return ZERO;
  if (Number.isNaN(value)) return NOT_A_NUMBER;
  if (!Number.isFinite(value)) return INFINITE;
  const share = (Math.log10(value) - decades.low) / (decades.high - decades.low);
  return LOWEST + Math.round(Math.min(Math.max(share, 0), 1) * (SHADES - 1));
}
