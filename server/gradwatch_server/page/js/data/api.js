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
 * @typedef {{kind: string, count: number, step: number, at: number, message: string, parameter: string | null}} LastEvent
 * @typedef {Run & {attributes: Record<string, string>, parameters: Parameter[], events: LastEvent[]}} RunDetail
 * @typedef {{steps: number[], last_steps: number[], min: Measured[], max: Measured[], mean: Measured[],
 *   last: Measured[], nonfinite: number[]}} Series
 * @typedef {{id: string, run: string, rule: string, severity: "warning" | "critical",
 *   state: "pending" | "firing" | "resolved", first_step: number, fired_step: number | null,
 *   resolved_step: number | null, first_at: number, fired_at: number | null, resolved_at: number | null,
 *   resolution: string | null, parameters: {name: string, value: Num, limit: Num}[], parameters_left_out: number,
 *   evidence: Record<string, Num>, summary: string, cause: string, remedy: string, muted: string | null,
 *   flaps: number, acknowledged_at: number | null, acknowledged_by: string | null}} Alert
 * @typedef {{project: string, run: string, rule: string, author: string, comment: string, ends_at: number}} NewSilence
 * @typedef {NewSilence & {id: string, created_at: number}} Silence
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
 * @typedef {{login: boolean, scope: "read" | "admin" | null, project: string | null}} Session what this page may do
 */

/** What was told last; nothing can be done before. @type {Session} */
export let session = { login: true, scope: null, project: null };

/** Fires on the window where the server asks for a token. */
export const LOCKED = "gradwatch:locked";

/**
 * @param {string} path
 * @param {Record<string, string | number | null | undefined>} [query]
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
async function ask(path, query = {}, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  const search = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return checked(await fetch(search ? `${path}?${search}` : path, { signal }));
}

/** @param {"POST" | "DELETE"} method @param {string} path @param {object} [document] @returns {Promise<Response>} */
async function send(method, path, document) {
  const headers = document ? { "content-type": "application/json" } : undefined;
  return checked(await fetch(path, { method, headers, body: document && JSON.stringify(document) }));
}

/** @param {Response} answer */
async function checked(answer) {
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401 && session.scope) dispatchEvent(new Event(LOCKED));
  throw new Refused(answer.status, problem.title ?? answer.statusText, problem.detail ?? "");
}

const SESSION = "/api/v1/session";

/** Ask what this page may do. @returns {Promise<Session>} */
export async function renewSession() {
  session = await (await ask(SESSION)).json();
  return session;
}

/** @param {string} token @returns {Promise<Session>} */
export async function logIn(token) {
  session = await (await send("POST", SESSION, { token })).json();
  return session;
}

/** Forget the token. @returns {Promise<unknown>} */
export const logOut = () => send("DELETE", SESSION);

/** Whether this page may change anything. */
export const mayChange = () => session.scope === "admin";

/** Where changes are told. */
export const streamAddress = () =>
  session.project === null ? "/api/v1/stream" : `/api/v1/stream?${new URLSearchParams({ project: session.project })}`;

/** @param {string} runId */
const at = (runId) => `/api/v1/runs/${encodeURIComponent(runId)}`;

/** @returns {Promise<Run[]>} */
export const runs = async () => (await ask("/api/v1/runs", { project: session.project })).json();

/** @param {string} runId @returns {Promise<RunDetail>} */
export const run = async (runId) => (await ask(at(runId))).json();

/** Alerts, the newest first, up to 1,000. @param {Record<string, string | number | null>} query @returns {Promise<Alert[]>} */
export const alerts = async (query) =>
  (await ask("/api/v1/alerts", { project: session.project, ...query })).json();

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

/**
 * @typedef {{from_step: number | null, to_step: number | null, samples: number, thresholds: number[], shares: number[],
 *   thirds: {first: number[], middle: number[], last: number[]}, steps: number[], rates: number[][],
 *   clip: number | null, recommended: number | null, reason: string}} ClipAdvice
 */

/** @param {string} runId @param {Record<string, number>} query @returns {Promise<ClipAdvice>} */
export const clipAdvice = async (runId, query) => (await ask(`${at(runId)}/clip-advice`, query)).json();

/** A number as the server spells it. @param {Measured | undefined} spelled @returns {number | null} */
export const number = (spelled) => (spelled === null || spelled === undefined ? null : Number(spelled));

/**
 * @typedef {{id: string, receiver: string, transition: string, step: number, state: string, created_at: number,
 *   due_at: number, delivered_at: number | null,
 *   attempts: {number: number, at: number, seconds: number, status: number | null, error: string}[]}} Delivery
 * @typedef {{name: string, host: string, signed: boolean, configured: boolean, due: number, delivered: number,
 *   dead: number, last_delivered_at: number | null, last_error: string | null, last_error_at: number | null,
 *   disabled: string | null}} ReceiverHealth
 * @typedef {{version: string, ready: boolean, database: string, runs: number, parameters: number, samples: number,
 *   stored_batches: number, duplicate_batches: number, stored_values: number, queued_batches: number,
 *   queue_capacity: number, commits: number, mean_commit_seconds: number | null, dropped: Record<string, number>,
 *   receivers: ReceiverHealth[]}} Overview
 */

/** @param {string} alertId */
const ofAlert = (alertId) => `/api/v1/alerts/${encodeURIComponent(alertId)}`;

/** @param {string} alertId @returns {Promise<Delivery[]>} */
export const deliveries = async (alertId) => (await ask(`${ofAlert(alertId)}/deliveries`)).json();

/** @param {string} alertId @param {string} author @returns {Promise<unknown>} */
export const acknowledge = (alertId, author) => send("POST", `${ofAlert(alertId)}/acknowledge`, { author });

/** @param {string} alertId @returns {Promise<unknown>} */
export const withdraw = (alertId) => send("DELETE", `${ofAlert(alertId)}/acknowledge`);

/** @returns {Promise<Silence[]>} */
export const silences = async () => (session.project === null ? (await ask("/api/v1/silences")).json() : []);

/** @param {Partial<NewSilence>} silence @returns {Promise<unknown>} */
export const addSilence = (silence) => send("POST", "/api/v1/silences", silence);

/** @param {string} silenceId @returns {Promise<unknown>} */
export const endSilence = (silenceId) => send("DELETE", `/api/v1/silences/${encodeURIComponent(silenceId)}`);

/** @param {string} deliveryId @returns {Promise<unknown>} */
export const replay = (deliveryId) => send("POST", `/api/v1/deliveries/${encodeURIComponent(deliveryId)}/replay`);

/** @param {string} name */
const ofReceiver = (name) => `/api/v1/receivers/${encodeURIComponent(name)}`;

/** Send everything again that was given up. @param {string} name @returns {Promise<unknown>} */
export const replayDead = (name) => send("POST", `${ofReceiver(name)}/replay`);

/** @param {string} name @returns {Promise<unknown>} */
export const enable = (name) => send("POST", `${ofReceiver(name)}/enable`);

/** @returns {Promise<Overview>} */
export const server = async () => (await ask("/api/v1/server")).json();
