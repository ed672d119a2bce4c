// Threshold advice: how much AGC would have clipped at each threshold, from what was measured, nothing being clipped.

import * as api from "./api.js";
import { el, fill, fitted, themed, whenThemed } from "./dom.js";
import { measured } from "./format.js";
import { decoded } from "./tile.js";

const [LEAST, MOST] = [Math.log10(0.002), Math.log10(1)];
const WIDTH = 360;
const HEIGHT = 120;
const AGAIN_MS = 5000;

/** The share of measured values above a threshold. @param {Float32Array} ordered ascending @param {number} threshold */
export function clipRate(ordered, threshold) {
  if (!ordered.length) return 0;
  let [low, high] = [0, ordered.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ordered[middle] <= threshold) low = middle + 1;
    else high = middle;
  }
  return 1 - low / ordered.length;
}

export class Advice {
  /** @param {string} runId */
  constructor(runId) {
    this.runId = runId;
    this.ordered = new Float32Array();
    this.loaded = -Infinity;
    this.covered = { from: -1, to: -1 };
    this.canvas = el("canvas", { class: "advice-curve", role: "img", "aria-label": "Clip rate against threshold" });
    this.slider = el("input", {
      type: "range",
      min: LEAST,
      max: MOST,
      step: 0.01,
      value: Math.log10(0.02),
      "aria-label": "Threshold",
      oninput: () => this.paint(),
    });
    this.text = el("p", { role: "status" });
    this.box = el(
      "section",
      { class: "side-part advice", hidden: true },
      el("h2", null, "Threshold advice"),
      this.canvas,
      this.slider,
      this.text,
    );
    new ResizeObserver(() => this.paint()).observe(this.box);
    whenThemed(this.box, () => this.paint());
  }

  /** @param {{from: number, to: number}} covered */
  async load(covered) {
    const now = performance.now();
    if (now - this.loaded < AGAIN_MS && covered.from === this.covered.from) return;
    [this.loaded, this.covered] = [now, covered];
    const body = await api.tile(this.runId, {
      statistic: "max_unit_ratio",
      from_step: covered.from,
      to_step: covered.to,
      points: 200,
    });
    const tile = decoded(body);
    this.ordered = tile.last.filter((value) => value >= 0 && Number.isFinite(value)).sort();
    this.box.hidden = this.ordered.length === 0;
    this.paint();
  }

  paint() {
    const width = Math.min(WIDTH, this.canvas.clientWidth || WIDTH);
    const context = fitted(this.canvas, width, HEIGHT);
    /** @param {number} log */
    const x = (log) => ((log - LEAST) / (MOST - LEAST)) * (width - 16) + 8;
    /** @param {number} rate */
    const y = (rate) => HEIGHT - 8 - rate * (HEIGHT - 18);
    context.beginPath();
    for (let pixel = 0; pixel <= 120; pixel++) {
      const log = LEAST + ((MOST - LEAST) * pixel) / 120;
      context.lineTo(x(log), y(clipRate(this.ordered, 10 ** log)));
    }
    context.strokeStyle = themed("accent");
    context.lineWidth = 2;
    context.stroke();
    context.lineTo(x(MOST), y(0));
    context.lineTo(x(LEAST), y(0));
    context.fillStyle = themed("accent");
    context.globalAlpha = 0.12;
    context.fill();
    context.globalAlpha = 1;
    const log = Number(this.slider.value);
    const rate = clipRate(this.ordered, 10 ** log);
    context.fillStyle = themed("ink");
    context.fillRect(x(log) - 0.5, 4, 1, HEIGHT - 12);
    context.beginPath();
    context.arc(x(log), y(rate), 4, 0, 7);
    context.fill();
    const share = rate > 0 && rate < 0.01 ? "under 1" : String(Math.round(rate * 100));
    this.slider.setAttribute("aria-valuetext", `${measured(10 ** log)} clips ${share} %`);
    fill(
      this.text,
      "A threshold of ",
      el("b", null, measured(10 ** log)),
      " would have clipped ",
      el("b", null, `${share} %`),
      " of the parameters at a sample, in at least one unit.",
    );
  }
}
