// Between the address and what a run's page looks at.

import * as address from "./navigation.js";

/** @typedef {import("./viewport.js").Looking} Looking */

export const STATISTICS = new Set([
  "ratio",
  "grad_norm",
  "clipped_grad_norm",
  "weight_norm",
  "max_unit_ratio",
  "zero_unit_share",
  "nonfinite_count",
  "clipped_unit_share",
  "update_norm",
]);
const WRITE_MS = 250;

/** What the address asks to look at. @param {number} end one past the last step @returns {Looking} */
export function looking(end) {
  const { query } = address.here();
  const from = Math.min(address.whole(query, "from") ?? 0, end - 1);
  const to = Math.min(Math.max(address.whole(query, "to") ?? end, from + 1), end);
  const step = address.whole(query, "step");
  const statistic = query.get("statistic") ?? "ratio";
  const cell = query.get("cell");
  return {
    from,
    to,
    end,
    step,
    pinned: step,
    parameter: query.get("parameter"),
    kept: query.get("kept"),
    statistic: STATISTICS.has(statistic) ? statistic : "ratio",
    cell: cell === "min" || cell === "last" ? cell : "max",
    alert: query.get("alert"),
    following: to >= end,
  };
}

/** Keep the address in step with the view. @param {import("./viewport.js").View} view @returns {() => void} stops it */
export function keepAddress(view) {
  let due = 0;
  view.subscribe((now, before) => {
    clearTimeout(due);
    const moved = now.from !== before.from || now.to !== before.to;
    if (moved) due = window.setTimeout(() => write(view.now), WRITE_MS);
    else write(now);
  });
  return () => clearTimeout(due);
}

/** @param {Looking} now */
function write(now) {
  const whole = now.from <= 0 && now.to >= now.end;
  address.note({
    from: whole ? null : Math.round(now.from),
    to: whole || now.following ? null : Math.round(now.to),
    step: now.pinned,
    parameter: now.parameter,
    kept: now.kept,
    statistic: now.statistic === "ratio" ? null : now.statistic,
    cell: now.cell === "max" ? null : now.cell,
    alert: now.alert,
  });
}
