// Requests to the server's HTTP API. Their types are generated from its OpenAPI document.

/**
 * @typedef {import("./generated/openapi.js").paths} Paths
 * @typedef {import("./generated/openapi.js").components["schemas"]} Schemas
 * @typedef {Schemas["Run"]} Run
 * @typedef {Schemas["RunDetail"]} RunDetail
 * @typedef {Schemas["KnownParameter"]} Parameter
 * @typedef {Schemas["Series"]} Series
 * @typedef {Omit<Series, "run" | "statistic" | "parameter">} Buckets
 * @typedef {Series["last"][number]} Measured a value of a series; null: the gradient was missing
 * @typedef {Run["scalars"]} Scalars
 * @typedef {Schemas["ClipAdvice"]} ClipAdvice
 * @typedef {Schemas["Alert"]} Alert
 * @typedef {Schemas["AlertDelivery"]} Delivery
 * @typedef {Schemas["Silence"]} Silence
 * @typedef {Schemas["NewSilence"]} NewSilence
 * @typedef {Schemas["Overview"]} Overview
 * @typedef {Schemas["ReceiverHealth"]} ReceiverHealth
 * @typedef {Schemas["Session"]} Session
 */

/**
 * The paths that have an operation with this method.
 * @template {"get" | "post" | "delete"} Method
 * @typedef {{[Path in keyof Paths]: Paths[Path] extends Record<Method, object> ? Path : never}[keyof Paths]} PathOf
 */

/**
 * The values for the placeholders and for the query of a path.
 * @template {keyof Paths} Path @template {"get" | "post" | "delete"} Method
 * @typedef {Paths[Path] extends Record<Method, {parameters: infer All}> ? Pick<All, keyof All & ("path" | "query")> : never} Parameters
 */

/**
 * The query of a GET request.
 * @template {PathOf<"get">} Path
 * @typedef {Paths[Path] extends {get: {parameters: {query?: infer Found}}} ? NonNullable<Found> : never} Query
 */

/**
 * The JSON document that a POST request sends.
 * @template {PathOf<"post">} Path
 * @typedef {Paths[Path] extends {post: {requestBody: {content: {"application/json": infer Found}}}} ? Found : undefined} RequestBody
 */

/**
 * The JSON document that a response holds.
 * @template {keyof Paths} Path @template {"get" | "post"} Method
 * @typedef {Paths[Path] extends Record<Method, {responses: {200: {content: {"application/json": infer Found}}}}> ? Found : never} ResponseBody
 */

/** A request that the server refused, in the server's own words. */
export class ApiError extends Error {
  /** @param {number} status @param {string} title @param {string} detail */
  constructor(status, title, detail) {
    super(detail || title);
    this.status = status;
    this.title = title;
  }
}

/** The permissions of this page, as the server last answered. @type {Session} */
export let session = { login: true, scope: null, project: null };

/** Name of the window's event for a request that was refused because it lacks a valid token. */
export const LOGIN_REQUIRED = "gradwatch:login-required";

/**
 * Return the address of a path with its placeholders and its query filled in.
 * @param {string} path
 * @param {{path?: Record<string, string>, query?: Record<string, string | number | null | undefined>}} parameters
 */
function address(path, { path: names = {}, query = {} }) {
  const filled = path.replace(/\{(\w+)\}/g, (_, name) => encodeURIComponent(names[name]));
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  const search = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return search ? `${filled}?${search}` : filled;
}

/** Send a request; a response that is not 2xx becomes an ApiError. @param {string} url @param {RequestInit} options */
async function request(url, options) {
  const response = await fetch(url, options);
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401 && session.scope) dispatchEvent(new Event(LOGIN_REQUIRED));
  throw new ApiError(response.status, problem.title ?? response.statusText, problem.detail ?? "");
}

/**
 * @template {PathOf<"get">} Path
 * @param {Path} path @param {Parameters<Path, "get">} parameters @param {AbortSignal} [signal]
 * @returns {Promise<ResponseBody<Path, "get">>}
 */
const get = async (path, parameters, signal) => (await request(address(path, parameters), { signal })).json();

/**
 * @template {PathOf<"post">} Path
 * @param {Path} path @param {Parameters<Path, "post">} parameters @param {RequestBody<Path>} body
 */
function post(path, parameters, body) {
  const headers = body ? { "content-type": "application/json" } : undefined;
  return request(address(path, parameters), { method: "POST", headers, body: body && JSON.stringify(body) });
}

/**
 * @template {PathOf<"delete">} Path
 * @param {Path} path @param {Parameters<Path, "delete">} parameters
 */
async function remove(path, parameters) {
  await request(address(path, parameters), { method: "DELETE" });
}

/** Load the permissions of this page. */
export async function renewSession() {
  session = await get("/api/v1/session", {});
  return session;
}

/** Log in; the server keeps the token in a cookie. @param {string} token */
export async function logIn(token) {
  const response = await post("/api/v1/session", {}, { token });
  session = /** @type {ResponseBody<"/api/v1/session", "post">} */ (await response.json());
}

/** Log out; the browser forgets the cookie. */
export const logOut = () => remove("/api/v1/session", {});

/** Return whether the token allows changes. */
export const mayChange = () => session.scope === "admin";

/** Return the address of the stream of changes. */
export const streamAddress = () => address("/api/v1/stream", { query: { project: session.project } });

export const runs = () => get("/api/v1/runs", { query: { project: session.project } });

/** @param {string} runId */
export const run = (runId) => get("/api/v1/runs/{id}", { path: { id: runId } });

/** @param {string} runId @param {Query<"/api/v1/runs/{id}/series">} query @param {AbortSignal} [signal] */
export const series = (runId, query, signal) => get("/api/v1/runs/{id}/series", { path: { id: runId }, query }, signal);

/**
 * Return a tile's bytes.
 * @param {string} runId @param {Query<"/api/v1/runs/{id}/tile">} query @param {AbortSignal} [signal]
 */
export async function tile(runId, query, signal) {
  const url = address(/** @satisfies {PathOf<"get">} */ ("/api/v1/runs/{id}/tile"), { path: { id: runId }, query });
  return (await request(url, { signal })).arrayBuffer();
}

/** @param {string} runId @param {Query<"/api/v1/runs/{id}/clip-advice">} query */
export const clipAdvice = (runId, query) => get("/api/v1/runs/{id}/clip-advice", { path: { id: runId }, query });

/** Return alerts, the newest first, at most 1,000. @param {Query<"/api/v1/alerts">} query */
export const alerts = (query) => get("/api/v1/alerts", { query: { project: session.project, ...query } });

/** @param {string} alertId */
export const deliveries = (alertId) => get("/api/v1/alerts/{id}/deliveries", { path: { id: alertId } });

/** @param {string} alertId @param {string} author */
export const acknowledge = (alertId, author) =>
  post("/api/v1/alerts/{id}/acknowledge", { path: { id: alertId } }, { author });

/** @param {string} alertId */
export const withdrawAcknowledgement = (alertId) =>
  remove("/api/v1/alerts/{id}/acknowledge", { path: { id: alertId } });

/** Return the silences in force; a token of one project may not list them. @returns {Promise<Silence[]>} */
export const silences = async () => (session.project === null ? get("/api/v1/silences", {}) : []);

/** @param {NewSilence} silence */
export const addSilence = (silence) => post("/api/v1/silences", {}, silence);

/** @param {string} silenceId */
export const endSilence = (silenceId) => remove("/api/v1/silences/{id}", { path: { id: silenceId } });

/** Send a delivery again. @param {string} deliveryId */
export const replay = (deliveryId) => post("/api/v1/deliveries/{id}/replay", { path: { id: deliveryId } }, undefined);

/** Send every dead delivery of a receiver again. @param {string} receiver */
export const replayDead = (receiver) =>
  post("/api/v1/receivers/{name}/replay", { path: { name: receiver } }, undefined);

/** Send to a disabled receiver again. @param {string} receiver */
export const enableReceiver = (receiver) =>
  post("/api/v1/receivers/{name}/enable", { path: { name: receiver } }, undefined);

export const server = () => get("/api/v1/server", {});

/**
 * Return a measured value as a number, NaN and infinities included; null where it is missing.
 * @param {Measured | undefined} value
 */
export const number = (value) => (value === null || value === undefined ? null : Number(value));
