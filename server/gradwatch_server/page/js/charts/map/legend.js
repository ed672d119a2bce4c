// What the colours mean.

import { STATES, viridis } from "../colours.js";
import { el, fill, fitted } from "../../dom/elements.js";
import { power } from "../../data/format.js";

const WIDTH = 180;

/** @returns {{element: HTMLElement, show: (scale: {low: number, high: number}) => void}} */
export function legend() {
  const bar = el("canvas", { class: "ramp-bar", "aria-hidden": "true" });
  const [low, middle, high] = [el("span"), el("span"), el("span")];
  const states = [
    ["zero", "zero"],
    ["infinite", "Inf"],
    ["nan", "NaN (or Inf, zoomed out)"],
    ["missing", "missing"],
  ].map(([kind, text]) =>
    el("span", { class: "state-key" }, el("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), text),
  );
  const element = el(
    "div",
    { class: "legend" },
    el("div", { class: "ramp" }, bar, el("div", { class: "ends" }, low, middle, high)),
    el("div", { class: "states" }, states),
  );
  document.documentElement.style.setProperty("--zero", STATES.zero);
  document.documentElement.style.setProperty("--infinite", STATES.infinite);
  document.documentElement.style.setProperty("--nan", STATES.notANumber);
  return {
    element,
    show(scale) {
      const context = fitted(bar, WIDTH, 10);
      for (let x = 0; x < WIDTH; x++) {
        context.fillStyle = `rgb(${viridis(x / (WIDTH - 1)).join(" ")})`;
        context.fillRect(x, 0, 1.5, 10);
      }
      fill(low, `≤ ${power(scale.low)}`);
      fill(middle, (scale.high - scale.low) % 2 ? "" : power((scale.low + scale.high) / 2));
      fill(high, `≥ ${power(scale.high)}`);
    },
  };
}
