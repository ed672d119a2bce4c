// Labels of statistics and titles of scalars.

/** @typedef {NonNullable<import("./api.js").Query<"/api/v1/runs/{id}/tile">["statistic"]>} Statistic */

/** The label of every statistic that the server knows, in the order of the menu. @type {Record<Statistic, string>} */
export const STATISTICS = {
  ratio: "Gradient / weight ratio",
  grad_norm: "Gradient norm",
  clipped_grad_norm: "Gradient norm after clipping",
  weight_norm: "Weight norm",
  max_unit_ratio: "Largest unit ratio",
  update_norm: "Update norm",
  zero_unit_share: "Share of zero units",
  clipped_unit_share: "Share of clipped units",
  nonfinite_count: "Non-finite elements",
};

/** @type {Statistic} */
export const DEFAULT_STATISTIC = "ratio";

/** By statistic, what a run needs so that it is measured; all others are in every sample. @type {Partial<Record<Statistic, string>>} */
export const NEEDS = {
  clipped_grad_norm: "it needs gradients that are clipped, by clip= or clip_grad_norm_",
  clipped_unit_share: "it needs clip=",
  update_norm: "its agent told no changes of weights",
};

/** By statistic, the one that measures the same after clipping. @type {Partial<Record<Statistic, Statistic>>} */
export const AFTER_CLIPPING = { grad_norm: "clipped_grad_norm" };

/** Titles of the scalars that agents measure; others are shown under their own name. @type {Record<string, string>} */
export const SCALARS = {
  loss: "Loss",
  global_grad_norm: "Global gradient norm",
  learning_rate: "Learning rate",
  overhead_ratio: "Agent overhead, share of a step",
};

/** @param {string | null} name @returns {name is Statistic} */
export const isStatistic = (name) => name !== null && Object.hasOwn(STATISTICS, name);
