// A series with gaps: without them a line would cross steps that have no value.

/** @typedef {import("../data/api.js").Buckets} Buckets */

/**
 * Return the series of a limit with an empty bucket wherever the series that it limits has values without it.
 * @param {Buckets} limit @param {Buckets} limited @returns {Buckets}
 */
export function withGaps(limit, limited) {
  /** @type {Buckets} */
  const found = { steps: [], last_steps: [], min: [], max: [], mean: [], last: [], nonfinite: [] };
  const values = /** @type {const} */ (["min", "max", "mean", "last"]);
  let next = 0;
  for (let index = 0; index <= limit.steps.length; index++) {
    // 1. The first bucket of the limited series that begins after the limit's previous one.
    while (limited.steps[next] <= (limit.last_steps[index - 1] ?? -Infinity)) next++;
    // 2. It is over before the limit's next bucket begins: there is a gap.
    if (limited.last_steps[next] < (limit.steps[index] ?? Infinity)) {
      found.steps.push(limited.steps[next]);
      found.last_steps.push(limited.last_steps[next]);
      found.nonfinite.push(0);
      for (const name of values) found[name].push(null);
    }
    // 3. The limit's own bucket; after the last one there is only a gap.
    if (index === limit.steps.length) break;
    found.steps.push(limit.steps[index]);
    found.last_steps.push(limit.last_steps[index]);
    found.nonfinite.push(limit.nonfinite[index]);
    for (const name of values) found[name].push(limit[name][index]);
  }
  return found;
}
