// The state of a run as a word with a coloured dot.

import { el } from "../dom/elements.js";

/** @param {import("../data/api.js").Run} run */
export function runState({ state, status }) {
  const text = status && status !== "completed" ? status : state;
  return el("span", { class: `state ${text}` }, text);
}
