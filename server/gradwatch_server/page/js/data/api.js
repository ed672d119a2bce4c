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

const SILENCE_MS = 30_000; // of a server before it answers, and between two pieces of what it sends
const PATIENCE_MS = 120_000; // for a server that is busy
const RETRY_MS = { first: 3_000, most: 60_000 };
const BUSY = 429;

/** A request that the server refused, in the server's own words; status 0: it gave no answer. */
export class ApiError extends Error {
  /** @param {number} status @param {string} title @param {string} detail @param {number} [retryAfter] in seconds */
  constructor(status, title, detail, retryAfter = 1) {
    super(detail || title);
    this.status = status;
    this.title = title;
    this.retryAfter = retryAfter;
  }
}

/** Return whether the same request would be refused again. @param {unknown} error */
const isFinal = (error) =>
  error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== BUSY;

/** Loads again what was not loaded: after a pause that doubles with each failure, and only while the page is visible. */
export class Retry {
  /** @param {() => unknown} load */
  constructor(load) {
    this.failures = 0;
    this.timer = 0;
    this.attempt = () => {
      if (document.hidden) return;
      this.cancel();
      load();
    };
  }

  /** Whether there will be another attempt. */
  get pending() {
    return this.timer !== 0;
  }

  /** Plan the next attempt, unless the answer is final; return whether there will be one. @param {unknown} error */
  schedule(error) {
    this.cancel();
    if (isFinal(error)) return false;
    const pause = Math.min(RETRY_MS.first * 2 ** this.failures++, RETRY_MS.most);
    this.timer = window.setTimeout(() => {
      document.addEventListener("visibilitychange", this.attempt);
      this.attempt();
    }, pause);
    return true;
  }

  /** Drop the next attempt. */
  cancel() {
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.attempt);
    this.timer = 0;
  }

  /** Begin anew with the shortest pause: the server has answered, or is back. */
  reset() {
    this.cancel();
    this.failures = 0;
  }
}

/** The permissions of this page, as the server last answered. @type {Session} */
export let session = { login: true, scope: null, project: null };

/** Name of the window's event for a request that was refused because it lacks a valid token. */
export const LOGIN_REQUIRED = "gradwatch:login-required";

/** Name of the window's event that tells how many requests wait because the server is busy (detail: number). */
export const WAITING = "gradwatch:waiting";

let waiting = 0;

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

/**
 * Send a request and read its response; one that is not 2xx becomes an ApiError. The request is aborted when the server
 * falls silent, and never for its length: a large tile takes minutes on a slow link.
 * @template Body
 * @param {string} url @param {RequestInit} options @param {(response: Response) => Promise<Body>} read
 */
async function request(url, options, read) {
  const controller = new AbortController();
  const abort = () => controller.abort();
  if (options.signal?.aborted) abort();
  options.signal?.addEventListener("abort", abort);
  let late = false;
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = window.setTimeout(() => {
      late = true;
      abort();
    }, SILENCE_MS);
  };
  heard();
  try {
    const response = await fetch(url, { ...options, signal: controller.signal });
    heard();
    if (response.ok) return await read(watched(response, heard));
    throw await refusal(response);
  } catch (error) {
    if (late) throw new ApiError(0, "No answer", `the server gave no answer within ${SILENCE_MS / 1000} s`);
    if (error instanceof TypeError) throw new ApiError(0, "No answer", "the server cannot be reached");
    throw error;
  } finally {
    clearTimeout(timer);
    options.signal?.removeEventListener("abort", abort);
  }
}

/** Return a response with the same body that tells of each piece. @param {Response} response @param {() => void} heard */
function watched({ body }, heard) {
  const watch = new TransformStream({
    transform(piece, controller) {
      heard();
      controller.enqueue(piece);
    },
  });
  return new Response(body?.pipeThrough(watch));
}

/** Return the error of a response that is not 2xx. @param {Response} response */
async function refusal(response) {
  const problem = await response.json().catch(() => ({}));
  if (response.status === 401 && session.scope) dispatchEvent(new Event(LOGIN_REQUIRED));
  const retryAfter = Number(response.headers.get("retry-after")) || 1;
  return new ApiError(response.status, problem.title ?? response.statusText, problem.detail ?? "", retryAfter);
}

/**
 * Send a request that only reads. A server that is busy is asked again, and the window is told that it waits.
 * @template Body
 * @param {string} url @param {AbortSignal | undefined} signal @param {(response: Response) => Promise<Body>} read
 */
async function ask(url, signal, read) {
  const until = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      return await request(url, { signal }, read);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== BUSY || Date.now() > until) throw error;
      await wait(error.retryAfter * 1000 * (1 + Math.random()));
      if (signal?.aborted) throw error;
    }
  }
}

/** Wait because the server is busy. @param {number} milliseconds */
async function wait(milliseconds) {
  dispatchEvent(new CustomEvent(WAITING, { detail: ++waiting }));
  await new Promise((resolve) => setTimeout(resolve, milliseconds));
  dispatchEvent(new CustomEvent(WAITING, { detail: --waiting }));
}

/**
 * @template {PathOf<"get">} Path
 * @param {Path} path @param {Parameters<Path, "get">} parameters @param {AbortSignal} [signal]
 * @returns {Promise<ResponseBody<Path, "get">>}
 */
const get = (path, parameters, signal) => ask(address(path, parameters), signal, (response) => response.json());

/**
 * @template {PathOf<"post">} Path
 * @param {Path} path @param {Parameters<Path, "post">} parameters @param {RequestBody<Path>} body
 */
function post(path, parameters, body) {
  const headers = body ? { "content-type": "application/json" } : undefined;
  const options = { method: "POST", headers, body: body && JSON.stringify(body) };
  return request(address(path, parameters), options, (response) => response.text());
}

/**
 * @template {PathOf<"delete">} Path
 * @param {Path} path @param {Parameters<Path, "delete">} parameters
 */
async function remove(path, parameters) {
  await request(address(path, parameters), { method: "DELETE" }, (response) => response.text());
}

/** Load the permissions of this page. */
export async function renewSession() {
  session = await get("/api/v1/session", {});
  return session;
}

/** Log in; the server keeps the token in a cookie. @param {string} token */
export async function logIn(token) {
  const answer = await post("/api/v1/session", {}, { token });
  session = /** @type {ResponseBody<"/api/v1/session", "post">} */ (JSON.parse(answer));
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
export function tile(runId, query, signal) {
  const url = address(/** @satisfies {PathOf<"get">} */ ("/api/v1/runs/{id}/tile"), { path: { id: runId }, query });
  return ask(url, signal, (response) => response.arrayBuffer());
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
