// The hatching of steps that were not sampled: light lines over the colours of the sample before them.

import { themeColour } from "../../dom/canvas.js";

const TILE = 8;

/** Make one tile of the hatching, in the colours of the theme. */
export function hatch() {
  const tile = document.createElement("canvas");
  tile.width = tile.height = TILE;
  const context = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  context.strokeStyle = themeColour("card");
  context.globalAlpha = 0.45;
  context.lineWidth = 1;
  context.beginPath();
  for (const shift of [-TILE, 0, TILE]) {
    context.moveTo(shift - 1, TILE + 1);
    context.lineTo(shift + TILE + 1, -1);
  }
  context.stroke();
  return tile;
}
