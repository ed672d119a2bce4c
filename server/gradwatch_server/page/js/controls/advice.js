// Threshold advice: how many units AGC would have clipped at each threshold, over the steps in view and at each of them.

import * as api from "../data/api.js";
import { Chart } from "../charts/line.js";
import { el, fill, fitted, themed, whenThemed } from "../dom/elements.js";
import { count, measured } from "../data/format.js";

/** @typedef {import("../data/api.js").ClipAdvice} ClipAdvice */

const WIDTH = 360;
const HEIGHT = 132;
const POINTS = 500;
const AGAIN_MS = 5000;
/** @type {[keyof ClipAdvice["thirds"], string, string][]} */
const THIRDS = [
  ["first", "first third", "second"],
  ["middle", "middle third", "third"],
  ["last", "last third", "fourth"],
];

/** The value at a threshold between two candidates. @param {number[]} thresholds @param {number[]} values @param {number} at */
export function between(thresholds, values, at) {
  const above = thresholds.findIndex((threshold) => threshold >= at);
  if (above <= 0) return values.at(above) ?? 0;
  const [low, high] = [Math.log(thresholds[above - 1]), Math.log(thresholds[above])];
  const part = (Math.log(at) - low) / (high - low);
  return values[above - 1] * (1 - part) + values[above] * part;
}

/** A share in words. @param {number} share 0 to 1 */
export const percent = (share) =>
  share > 0 && share < 0.01 ? "under 1 %" : share < 1 && share > 0.99 ? "over 99 %" : `${Math.round(share * 100)} %`;

export class Advice {
  /** @param {string} runId @param {import("../data/viewport.js").View} view */
  constructor(runId, view) {
    this.runId = runId;
    /** @type {ClipAdvice | null} */
    this.advice = null;
    this.loaded = -Infinity;
    this.covered = { from: -1, to: -1 };
    this.touched = false;
    this.canvas = el("canvas", { class: "advice-curve", role: "img" });
    this.slider = el("input", {
      type: "range",
      min: 0,
      step: 1,
      "aria-label": "Threshold",
      oninput: () => {
        this.touched = true;
        this.show();
      },
    });
    this.key = el(
      "p",
      { class: "advice-key soft" },
      THIRDS.map(([, name, colour]) => el("span", null, el("i", { class: `dot ${colour}` }), name)),
      el("span", null, el("i", { class: "dot" }), "all"),
    );
    this.text = el("p", { role: "status" });
    this.reason = el("p", { class: "soft" });
    this.box = el(
      "section",
      { class: "side-part advice", hidden: true },
      el("h2", null, "Threshold advice"),
      this.canvas,
      this.slider,
      this.key,
      this.text,
      this.reason,
    );
    this.chart = new Chart(view, "Share of units clipped", { labelled: true });
    this.chart.box.hidden = true;
    new ResizeObserver(() => this.paint()).observe(this.box);
    whenThemed(this.box, () => this.paint());
  }

  /** @param {{from: number, to: number}} covered */
  async load(covered) {
    const now = performance.now();
    if (now - this.loaded < AGAIN_MS && covered.from === this.covered.from) return;
    [this.loaded, this.covered] = [now, covered];
    const query = { from_step: covered.from, to_step: covered.to, points: POINTS };
    const advice = await api.clipAdvice(this.runId, query);
    this.box.hidden = this.chart.box.hidden = advice.samples === 0;
    if (!advice.samples) return;
    this.advice = advice;
    this.slider.max = String(advice.thresholds.length - 1);
    const wanted = advice.recommended ?? advice.clip ?? 0.02;
    if (!this.touched) this.slider.value = String(Math.max(0, advice.thresholds.indexOf(wanted)));
    this.show();
  }

  /** Show the chosen threshold everywhere. */
  show() {
    if (!this.advice) return;
    const { thresholds, shares, steps, rates, clip, recommended, reason } = this.advice;
    const index = Number(this.slider.value);
    const chosen = thresholds[index];
    const share = percent(shares[index]);
    this.slider.setAttribute("aria-valuetext", `${measured(chosen)} clips ${share} of the units`);
    fill(
      this.text,
      "A threshold of ",
      el("b", null, measured(chosen)),
      " would have clipped ",
      el("b", null, share),
      ` of the units in ${count(steps.length)} samples.`,
      clip !== null && [" In force: ", el("b", null, measured(clip)), "."],
    );
    fill(this.reason, recommended !== null && [el("b", null, `Recommended: ${measured(recommended)}. `)], reason);
    const lines = [line(`at ${measured(chosen)}`, "accent", this.advice, (row) => row[index])];
    if (clip !== null && clip !== chosen)
      lines.push(
        line(`in force, ${measured(clip)}`, "second", this.advice, (row) => between(thresholds, row, clip)),
      );
    if (rates.length) this.chart.show(lines);
    this.paint();
  }

  paint() {
    if (!this.advice) return;
    const { thresholds, shares, thirds, clip, recommended } = this.advice;
    const width = Math.min(WIDTH, this.canvas.clientWidth || WIDTH);
    const context = fitted(this.canvas, width, HEIGHT);
    const [least, most] = [Math.log(thresholds[0]), Math.log(thresholds[thresholds.length - 1])];
    /** @param {number} threshold */
    const x = (threshold) => ((Math.log(threshold) - least) / (most - least)) * (width - 16) + 8;
    /** @param {number} share */
    const y = (share) => HEIGHT - 22 - share * (HEIGHT - 34);
    /** @param {number[]} values @param {string} colour @param {number} wide */
    const curve = (values, colour, wide) => {
      context.beginPath();
      values.forEach((share, index) => context.lineTo(x(thresholds[index]), y(share)));
      context.strokeStyle = themed(colour);
      context.lineWidth = wide;
      context.stroke();
    };
    context.strokeStyle = themed("line");
    for (const share of [0, 0.5, 1]) context.strokeRect(8, Math.round(y(share)) + 0.5, width - 16, 0);
    if (recommended !== null) {
      context.fillStyle = themed("quiet-back");
      context.fillRect(x(recommended) - 9, y(1) - 8, 18, y(0) - y(1) + 8);
    }
    for (const [name, , colour] of THIRDS) curve(thirds[name], colour, 1.2);
    curve(shares, "accent", 2.2);
    if (clip !== null) {
      context.setLineDash([4, 3]);
      context.strokeStyle = themed("bad");
      context.lineWidth = 1;
      context.strokeRect(Math.min(width - 8, Math.max(8, x(clip))), y(1) - 8, 0, y(0) - y(1) + 8);
      context.setLineDash([]);
    }
    const index = Number(this.slider.value);
    context.fillStyle = themed("ink");
    context.fillRect(x(thresholds[index]) - 0.5, y(1) - 8, 1, y(0) - y(1) + 8);
    context.beginPath();
    context.arc(x(thresholds[index]), y(shares[index]), 4, 0, 7);
    context.fill();
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = themed("soft");
    context.textBaseline = "bottom";
    const last = thresholds.length - 1;
    for (let place = 0; place <= last; place += 2) {
      context.textAlign = place === 0 ? "left" : place === last ? "right" : "center";
      context.fillText(String(thresholds[place]), place === 0 ? 2 : place === last ? width - 2 : x(thresholds[place]), HEIGHT);
    }
    const said = thresholds.map((threshold, place) => `${threshold}: ${percent(shares[place])}`).join(", ");
    this.canvas.setAttribute("aria-label", `Share of units clipped by threshold. ${said}`);
  }

  close() {
    this.chart.close();
  }
}

/** @param {string} label @param {string} colour @param {ClipAdvice} advice @param {(row: number[]) => number} value */
function line(label, colour, { steps, rates }, value) {
  const values = rates.map(value);
  const nonfinite = steps.map(() => 0);
  const series = { steps, last_steps: steps, min: values, max: values, mean: values, last: values, nonfinite };
  return { label, colour, series };
}
