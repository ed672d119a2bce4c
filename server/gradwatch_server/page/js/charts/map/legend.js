// The meaning of the map's colours.

import { power } from "../../data/format.js";
import { prepareCanvas } from "../../dom/canvas.js";
import { el, fill } from "../../dom/elements.js";
import { STATES, viridis } from "../colours.js";

const WIDTH = 180;
const HEIGHT = 10;
/** Style class and label of each state that is not a number on the scale. */
const LABELS = [
  ["zero", "zero"],
  ["infinite", "Inf"],
  ["nan", "NaN (or Inf, zoomed out)"],
  ["missing", "missing, or stepped by no optimizer"],
  ["unsampled", "not sampled"],
];

/** @returns {{element: HTMLElement, show: (decades: import("../../data/tile.js").Decades) => void}} */
export function legend() {
  const bar = el("canvas", { class: "ramp-bar", "aria-hidden": "true" });
  const [low, middle, high] = [el("span"), el("span"), el("span")];
  const states = LABELS.map(([name, text]) =>
    el("span", { class: "state-key" }, el("i", { class: `swatch ${name}`, "aria-hidden": "true" }), text),
  );
  const element = el(
    "div",
    { class: "legend" },
    el("div", { class: "ramp" }, bar, el("div", { class: "ends" }, low, middle, high)),
    el("div", { class: "states" }, states),
  );
  const { style } = document.documentElement;
  style.setProperty("--zero", STATES.zero);
  style.setProperty("--infinite", STATES.infinite);
  style.setProperty("--nan", STATES.notANumber);
  return {
    element,
    show(decades) {
      const context = prepareCanvas(bar, WIDTH, HEIGHT);
      for (let x = 0; x < WIDTH; x++) {
        context.fillStyle = `rgb(${viridis(x / (WIDTH - 1)).join(" ")})`;
        context.fillRect(x, 0, 1.5, HEIGHT);
      }
      fill(low, `≤ ${power(decades.low)}`);
      fill(middle, (decades.high - decades.low) % 2 ? "" : power((decades.low + decades.high) / 2));
      fill(high, `≥ ${power(decades.high)}`);
    },
  };
}
