// The viewport in the address, so that a link to a run's page shows the same steps, parameter and alert.

import { current, setQuery, wholeNumber } from "./navigation.js";
import { DEFAULT_STATISTIC, isStatistic } from "./statistics.js";

/** @typedef {import("./viewport.js").ViewportState} ViewportState */

const WRITE_MS = 250;

/**
 * Return the state that the current address asks for.
 * @param {number} end one past the last step @returns {ViewportState}
 */
export function readPermalink(end) {
  const { query } = current();
  const from = Math.min(wholeNumber(query, "from") ?? 0, end - 1);
  const to = Math.min(Math.max(wholeNumber(query, "to") ?? end, from + 1), end);
  const step = wholeNumber(query, "step");
  const statistic = query.get("statistic");
  const cell = query.get("cell");
  return {
    from,
    to,
    end,
    step,
    pinned: step,
    parameter: query.get("parameter"),
    kept: query.get("kept"),
    statistic: isStatistic(statistic) ? statistic : DEFAULT_STATISTIC,
    cell: cell === "min" || cell === "last" ? cell : "max",
    alert: query.get("alert"),
    following: to >= end,
  };
}

/**
 * Write every change of the viewport into the address.
 * @param {import("./viewport.js").Viewport} viewport @returns {() => void} stops it
 */
export function keepPermalink(viewport) {
  let timer = 0;
  const stop = () => {
    clearTimeout(timer);
    timer = 0;
  };
  viewport.subscribe(() => {
    // Browsers limit how often the address may change, WebKit to 100 times in 10 seconds.
    timer ||= window.setTimeout(() => {
      timer = 0;
      write(viewport.state);
    }, WRITE_MS);
  });
  return stop;
}

/** @param {ViewportState} state */
function write(state) {
  const whole = state.from <= 0 && state.to >= state.end;
  setQuery({
    from: whole ? null : Math.round(state.from),
    to: whole || state.following ? null : Math.round(state.to),
    step: state.pinned,
    parameter: state.parameter,
    kept: state.kept,
    statistic: state.statistic === DEFAULT_STATISTIC ? null : state.statistic,
    cell: state.cell === "max" ? null : state.cell,
    alert: state.alert,
  });
}
