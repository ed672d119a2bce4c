// Where a limit ends: a line would go on to the next one, over steps that had none.

/** @typedef {import("../data/api.js").Series} Series */

/**
 * The limit's series, with an empty bucket wherever the series that it limits went on without it.
 * @param {Series} limit @param {Series} limited @returns {Series}
 */
export function gapped(limit, limited) {
  /** @type {Series} */
  const found = { steps: [], last_steps: [], min: [], max: [], mean: [], last: [], nonfinite: [] };
  const values = /** @type {const} */ (["min", "max", "mean", "last"]);
  let next = 0;
  for (let index = 0; index <= limit.steps.length; index++) {
    while (limited.steps[next] <= (limit.last_steps[index - 1] ?? -Infinity)) next++;
    if (limited.last_steps[next] < (limit.steps[index] ?? Infinity)) {
      found.steps.push(limited.steps[next]);
      found.last_steps.push(limited.last_steps[next]);
      found.nonfinite.push(0);
      for (const name of values) found[name].push(null);
    }
    if (index === limit.steps.length) break;
    found.steps.push(limit.steps[index]);
    found.last_steps.push(limit.last_steps[index]);
    found.nonfinite.push(limit.nonfinite[index]);
    for (const name of values) found[name].push(limit[name][index]);
  }
  return found;
}
