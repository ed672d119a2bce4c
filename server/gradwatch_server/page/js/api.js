// What the server is asked. A refusal is an Error that carries the server's own words.

/**
 * @typedef {number | "NaN" | "Infinity" | "-Infinity"} Num
 * @typedef {Num | null} Measured
 * @typedef {{id: string, project: string, name: string, state: "running" | "stalled" | "finished", status: string | null,
 *   exit_code: number | null, last_step: number | null, sample_count: number, started_at: number, last_seen_at: number,
 *   finished_at: number | null, firing: number, worst_rule: string | null, worst_severity: string | null,
 *   scalars: Record<string, Num>, dropped: Record<string, number>}} Run
 * @typedef {{name: string, shape: number[], dtype: string, depth: number, units: number, trainable: boolean,
 *   kind: string}} Parameter
 * @typedef {Run & {attributes: Record<string, string>, parameters: Parameter[]}} RunDetail
 * @typedef {{steps: number[], last_steps: number[], min: Measured[], max: Measured[], mean: Measured[],
 *   last: Measured[], nonfinite: number[]}} Series
 * @typedef {{id: string, run: string, rule: string, severity: "warning" | "critical",
 *   state: "pending" | "firing" | "resolved", first_step: number, fired_step: number | null,
 *   resolved_step: number | null, first_at: number, fired_at: number | null, resolved_at: number | null,
 *   resolution: string | null, parameters: {name: string, value: Num, limit: Num}[], parameters_left_out: number,
 *   evidence: Record<string, Num>, summary: string, cause: string, remedy: string}} Alert
 */

export class Refused extends Error {
  /** @param {number} status @param {string} title @param {string} detail */
  constructor(status, title, detail) {
    super(detail || title);
    this.status = status;
    this.title = title;
  }
}

/**
 * @param {string} path
 * @param {Record<string, string | number | null | undefined>} [query]
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
async function ask(path, query = {}, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  const search = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  const answer = await fetch(search ? `${path}?${search}` : path, { signal });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, problem.title ?? answer.statusText, problem.detail ?? "");
}

/** @param {string} runId */
const at = (runId) => `/api/v1/runs/${encodeURIComponent(runId)}`;

/** @returns {Promise<Run[]>} */
export const runs = async () => (await ask("/api/v1/runs")).json();

/** @param {string} runId @returns {Promise<RunDetail>} */
export const run = async (runId) => (await ask(at(runId))).json();

/** @param {Record<string, string | null>} query @returns {Promise<Alert[]>} */
export const alerts = async (query) => (await ask("/api/v1/alerts", query)).json();

/**
 * @param {string} runId @param {Record<string, string | number | null>} query @param {AbortSignal} [signal]
 * @returns {Promise<Series>}
 */
export const series = async (runId, query, signal) => (await ask(`${at(runId)}/series`, query, signal)).json();

/**
 * @param {string} runId @param {Record<string, string | number | null>} query @param {AbortSignal} [signal]
 * @returns {Promise<ArrayBuffer>}
 */
export const tile = async (runId, query, signal) => (await ask(`${at(runId)}/tile`, query, signal)).arrayBuffer();

/** A number as the server spells it. @param {Measured | undefined} spelled @returns {number | null} */
export const number = (spelled) => (spelled === null || spelled === undefined ? null : Number(spelled));
