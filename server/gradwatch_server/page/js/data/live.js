// The stream of changes from the server (server-sent events), and reloading after a change.

import { LOGIN_REQUIRED, streamAddress } from "./api.js";

/**
 * @typedef {{id: string, project: string, last_step: number | null, sample_count: number}} Change one run
 */

const RECONNECT_MS = [500, 1000, 2000, 5000];
const RELOAD_MS = 700;
const RELOAD_ANYWAY_MS = 15_000;
const PAUSE_MS = 300;

/** Dispatches "runs" (detail: Change[]) after changes and "reconnected" when a lost connection is back. */
export class ChangeStream extends EventTarget {
  /** @param {HTMLElement} status where the state of the connection is shown */
  constructor(status) {
    super();
    this.status = status;
    this.failures = 0;
    /** @type {EventSource | null} */
    this.connection = null;
    this.timer = 0;
    this.interrupted = false;
    this.stopped = true;
    // A hidden tab closes its connection: browsers allow only six to a server.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.disconnect() : this.connect()));
    addEventListener("pagehide", () => this.disconnect());
    addEventListener("pageshow", (event) => event.persisted && this.connect());
  }

  start() {
    this.stopped = false;
    this.connect();
  }

  /** Disconnect until the stream is started again. */
  stop() {
    this.stopped = true;
    this.disconnect();
    delete this.status.dataset.state;
    this.status.textContent = "";
  }

  connect() {
    if (this.stopped || this.connection || document.hidden) return;
    clearTimeout(this.timer);
    const connection = new EventSource(streamAddress());
    this.connection = connection;
    connection.addEventListener("open", () => this.connected());
    connection.addEventListener("runs", (event) => {
      this.dispatchEvent(new CustomEvent("runs", { detail: JSON.parse(event.data) }));
    });
    connection.addEventListener("error", () => this.failed(connection));
  }

  connected() {
    this.failures = 0;
    this.showStatus("live", "Live");
    if (this.interrupted) this.dispatchEvent(new Event("reconnected"));
    this.interrupted = false;
  }

  /** @param {EventSource} connection */
  failed(connection) {
    // A closed connection was refused; one that was cut off would reconnect by itself.
    if (connection.readyState === EventSource.CLOSED) dispatchEvent(new Event(LOGIN_REQUIRED));
    connection.close();
    if (this.connection !== connection) return;
    this.connection = null;
    this.interrupted = true;
    this.showStatus("lost", "Connection lost, trying again");
    const wait = RECONNECT_MS[Math.min(this.failures++, RECONNECT_MS.length - 1)];
    this.timer = window.setTimeout(() => this.connect(), wait);
  }

  disconnect() {
    clearTimeout(this.timer);
    this.connection?.close();
    this.connection = null;
    this.interrupted = true;
  }

  /** @param {"live" | "lost"} state @param {string} text */
  showStatus(state, text) {
    if (this.status.textContent === text) return;
    this.status.dataset.state = state;
    this.status.textContent = text;
  }
}

/**
 * Load again when any run changes, at most about once a second, and every 15 seconds in any case.
 * @param {ChangeStream} changes @param {() => Promise<void>} load
 * @returns {() => void} stops it
 */
export function reloadOnChanges(changes, load) {
  let timer = 0;
  const reload = () =>
    load()
      .catch(() => undefined)
      .finally(() => (timer = 0));
  const schedule = () => {
    timer ||= window.setTimeout(reload, RELOAD_MS);
  };
  changes.addEventListener("runs", schedule);
  changes.addEventListener("reconnected", schedule);
  const interval = setInterval(schedule, RELOAD_ANYWAY_MS);
  return () => {
    changes.removeEventListener("runs", schedule);
    changes.removeEventListener("reconnected", schedule);
    clearInterval(interval);
    clearTimeout(timer);
  };
}

/**
 * Load again whenever one run changes. Loads do not overlap, and a pause follows each that is as long as the load.
 * @param {ChangeStream} changes @param {string} runId @param {() => Promise<void>} load
 * @returns {() => void} stops it
 */
export function reloadOnRunChanges(changes, runId, load) {
  let [busy, wanted] = [false, false];
  const reload = async () => {
    wanted = true;
    if (busy) return;
    busy = true;
    while (wanted) {
      wanted = false;
      const started = performance.now();
      await load().catch(() => undefined);
      const took = performance.now() - started;
      await new Promise((resolve) => setTimeout(resolve, Math.max(PAUSE_MS, took)));
    }
    busy = false;
  };
  /** @param {Event} event */
  const changed = (event) => {
    const { detail } = /** @type {CustomEvent<Change[]>} */ (event);
    if (detail.some(({ id }) => id === runId)) reload();
  };
  changes.addEventListener("runs", changed);
  changes.addEventListener("reconnected", reload);
  return () => {
    changes.removeEventListener("runs", changed);
    changes.removeEventListener("reconnected", reload);
  };
}
