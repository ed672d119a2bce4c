// Up to four runs beside each other: their curves in one chart, their maps on one scale and one range of steps.

import * as address from "../data/navigation.js";
import * as api from "../data/api.js";
import { Chart } from "../charts/line.js";
import { controls } from "../controls/toolbar.js";
import { el, fill } from "../dom/elements.js";
import { legend } from "../charts/map/legend.js";
import { keepAddress, looking } from "../data/permalink.js";
import { LayerMap } from "../charts/map/layer-map.js";
import { following } from "./run.js";
import { stateSign } from "./runs.js";
import { TileSource } from "../data/source.js";
import { wide } from "../charts/strips.js";
import { View } from "../data/viewport.js";

const CURVE_POINTS = 1000;
const COLOURS = ["accent", "second", "third", "fourth"];
const CURVES = [
  { title: "Loss", scalar: "loss", log: false },
  { title: "Global gradient norm", scalar: "global_grad_norm", log: true },
];

const SETTLE_MS = 60; // the maps' tiles arrive one after the other

/** @typedef {{run: api.RunDetail, map: LayerMap, source: TileSource}} Side */

/** @param {HTMLElement} main @param {string[]} ids @param {import("../data/live.js").Live} live */
export async function compareView(main, ids, live) {
  document.title = "Compare · gradwatch";
  const runs = await Promise.all(ids.map((id) => api.run(id)));
  const end = Math.max(...runs.map((run) => (run.last_step ?? 0) + 1));
  const view = new View(looking(end));
  const key = legend();
  const curves = CURVES.map((curve) => ({
    ...curve,
    chart: new Chart(view, curve.title, { log: curve.log, height: 170 }),
  }));
  /** @type {Side[]} */
  const sides = runs.map((run) => {
    const map = new LayerMap(view, 170);
    return {
      run,
      map,
      source: new TileSource(
        run.id,
        view,
        run.parameters.length,
        () => (map.box.clientWidth || main.clientWidth / 2) * (window.devicePixelRatio || 1),
      ),
    };
  });
  const paint = () => {
    const scales = sides.filter(({ source }) => source.tile?.steps.length).map(({ source }) => source.scale);
    if (!scales.length) return;
    const scale = { low: Math.min(...scales.map(({ low }) => low)), high: Math.max(...scales.map(({ high }) => high)) };
    key.show(scale);
    for (const { map, source } of sides) if (source.tile) map.show(source.tile, scale);
    main.dataset.drawn = String(sides.filter(({ source }) => source.tile).length);
  };
  const asking = { now: new AbortController(), due: 0 };
  const loadCurves = async () => {
    asking.now.abort();
    asking.now = new AbortController();
    const { signal } = asking.now;
    const { from, to } = sides[0].source.covered;
    for (const { chart, scalar, log } of curves) {
      const query = { statistic: scalar, from_step: from, to_step: to, points: CURVE_POINTS };
      const series = await Promise.all(runs.map((run) => api.series(run.id, query, signal)));
      chart.scale(log || wide(series));
      chart.show(runs.map((run, index) => ({ label: run.name, colour: COLOURS[index], series: series[index] })));
    }
  };
  for (const { source } of sides)
    source.addEventListener("tile", () => {
      paint();
      clearTimeout(asking.due);
      asking.due = window.setTimeout(() => loadCurves().catch(() => undefined), SETTLE_MS);
    });
  const stopAddress = keepAddress(view);

  fill(
    main,
    el(
      "div",
      { class: "head" },
      el(
        "div",
        null,
        el("p", { class: "soft crumb" }, el("a", { href: "/" }, "Runs"), " / compare"),
        el("h1", null, `${runs.length} runs`),
      ),
    ),
    el(
      "section",
      { class: "card stage" },
      controls(view),
      curves.map(({ chart }) => chart.box),
      el("div", { class: "under" }, key.element),
    ),
    el(
      "div",
      { class: "sides" },
      sides.map(({ run, map }, index) =>
        el(
          "section",
          { class: "card stage" },
          el(
            "h2",
            { class: "side-name" },
            el("i", { class: `dot ${COLOURS[index]}` }),
            el("a", { href: `/runs/${run.id}` }, run.name),
            stateSign(run),
          ),
          map.box,
        ),
      ),
    ),
  );
  await Promise.all(sides.map(({ source }) => source.load()));
  const stops = sides.map((side) =>
    following(live, side.run.id, async () => {
      const renewed = await api.run(side.run.id);
      view.grow((renewed.last_step ?? 0) + 1);
      await side.source.renew();
    }),
  );
  return {
    close() {
      for (const stop of stops) stop();
      stopAddress();
      clearTimeout(asking.due);
      asking.now.abort();
      for (const { source } of sides) source.close();
      for (const { chart } of curves) chart.close();
      delete main.dataset.drawn;
    },
  };
}

/** The runs that the address asks to compare. @returns {string[]} */
export function compared() {
  return (address.here().query.get("compare") ?? "").split(",").filter(Boolean).slice(0, 4);
}
