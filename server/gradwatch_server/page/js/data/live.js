// The stream of changes from the server, what the bar says of it, and reloading after a change.

import { LOGIN_REQUIRED, Retry, streamAddress, WAITING } from "./api.js";
import { ago } from "./format.js";
import { listen } from "./stream/listen.js";

/** @typedef {import("./stream/connection.js").Change} Change */
/** @typedef {import("./stream/connection.js").StreamMessage} StreamMessage */

const RELOAD_MS = 700;
const RELOAD_ANYWAY_MS = 15_000;
const PAUSE_MS = 300;
const LOOK_MS = 1_000;
const WORKER_SILENCE = 2; // times what its stream may be silent; then the worker itself is gone

/** Dispatches "runs" (detail: Change[]) after changes and "reconnected" when a lost connection is back. */
export class ChangeStream extends EventTarget {
  /**
   * @param {HTMLElement} status where the state of the connection is shown
   * @param {HTMLElement} age where the age of what is shown is told, unless it is live
   */
  constructor(status, age) {
    super();
    this.status = status;
    this.age = age;
    /** Stops listening; null: it does not listen. @type {(() => void) | null} */
    this.leave = null;
    this.connected = false;
    /** Whether the stream broke off or fell silent, and has not been heard since. */
    this.lost = false;
    /** Whether changes may have been missed. */
    this.interrupted = false;
    this.stopped = true;
    /** Why what is shown could not be loaded again; "" if it could. */
    this.trouble = "";
    /** How many requests wait because the server is busy. */
    this.waiting = 0;
    /** When the server was heard last, and when what is shown was up to date last. Milliseconds. */
    this.heardAt = this.freshAt = Date.now();
    this.silenceMs = Infinity;
    // A hidden tab needs no changes; when it is seen again, everything is loaded.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.disconnect() : this.connect()));
    addEventListener("pagehide", () => this.disconnect());
    addEventListener("pageshow", (event) => event.persisted && this.connect());
    addEventListener(WAITING, (event) => {
      this.waiting = /** @type {CustomEvent<number>} */ (event).detail;
      this.show();
    });
    setInterval(() => this.look(), LOOK_MS);
  }

  start() {
    this.stopped = false;
    this.connect();
  }

  /** Disconnect until the stream is started again. */
  stop() {
    this.stopped = true;
    this.disconnect();
    this.show();
  }

  connect() {
    if (this.stopped || this.leave || document.hidden) return;
    this.heardAt = Date.now();
    this.silenceMs = Infinity;
    this.leave = listen(streamAddress(), (message) => this.receive(message));
  }

  disconnect() {
    this.leave?.();
    this.leave = null;
    this.connected = false;
    this.interrupted = true;
  }

  /** @param {StreamMessage} message */
  receive({ kind, changes = [], silenceMs = this.silenceMs }) {
    this.heardAt = Date.now();
    this.silenceMs = silenceMs;
    this.connected = kind === "word";
    this.lost = !this.connected;
    if (kind === "refused") dispatchEvent(new Event(LOGIN_REQUIRED));
    if (this.connected && this.interrupted) this.dispatchEvent(new Event("reconnected"));
    this.interrupted = this.lost;
    if (changes.length) this.dispatchEvent(new CustomEvent("runs", { detail: changes }));
    this.show();
  }

  /** Note whether what is shown could be loaded again. @param {unknown} [error] */
  loaded(error) {
    this.trouble = error === undefined ? "" : error instanceof Error ? error.message : String(error);
    if (!this.trouble) this.freshAt = Date.now();
    this.show();
  }

  /** Look every second: a worker that says nothing at all is replaced, and the age goes on. */
  look() {
    if (this.leave && Date.now() - this.heardAt > this.silenceMs * WORKER_SILENCE) {
      this.lost = true;
      this.disconnect();
      this.connect();
    }
    this.show();
  }

  /** Show the state of the connection and, unless all is well, the age of what is shown. */
  show() {
    const [state, text] = this.stateText();
    if (state === "live") this.freshAt = Date.now();
    if (this.status.textContent !== text) {
      this.status.textContent = text;
      if (state) this.status.dataset.state = state;
      else delete this.status.dataset.state;
    }
    this.age.hidden = state !== "lost" && state !== "busy";
    const age = `shown as of ${ago(this.freshAt / 1000)}`;
    if (!this.age.hidden && this.age.textContent !== age) this.age.textContent = age;
  }

  /** @returns {["" | "live" | "lost" | "busy", string]} */
  stateText() {
    if (this.stopped) return ["", ""];
    if (this.lost) return ["lost", "Connection lost, trying again"];
    if (!this.connected) return ["", "Connecting"];
    if (this.waiting) return ["busy", "The server is busy, waiting for it"];
    if (this.trouble) return ["lost", `Not loaded: ${this.trouble}`];
    return ["live", "Live"];
  }
}

/**
 * Load again when any run changes, at most about once a second, and every 15 seconds in any case.
 * @param {ChangeStream} changes @param {() => Promise<void>} load
 * @returns {() => void} stops it
 */
export function reloadOnChanges(changes, load) {
  let [timer, closed] = [0, false];
  /** @param {unknown} [error] */
  const loaded = (error) => {
    timer = 0;
    if (!closed) changes.loaded(error);
  };
  const reload = () => load().then(() => loaded(), loaded);
  const schedule = () => {
    timer ||= window.setTimeout(reload, RELOAD_MS);
  };
  changes.addEventListener("runs", schedule);
  changes.addEventListener("reconnected", schedule);
  const interval = setInterval(schedule, RELOAD_ANYWAY_MS);
  return () => {
    closed = true;
    changes.removeEventListener("runs", schedule);
    changes.removeEventListener("reconnected", schedule);
    clearInterval(interval);
    clearTimeout(timer);
    changes.loaded();
  };
}

/**
 * Load again whenever one run changes. Loads do not overlap, and a pause follows each that is as long as the load. After
 * a failure the next attempt waits for its time, whatever changes, or for the connection to be back.
 * @param {ChangeStream} changes @param {string} runId @param {() => Promise<void>} load
 * @param {Retry} tileRetry attempts at the run's tile, which `load` does not make while one is due later
 * @returns {() => void} stops it
 */
export function reloadOnRunChanges(changes, runId, load, tileRetry) {
  let [busy, wanted, closed] = [false, false, false];
  const retry = new Retry(() => reload());
  const reload = async () => {
    wanted = true;
    if (busy) return;
    busy = true;
    while (wanted && !closed) {
      wanted = false;
      const started = performance.now();
      try {
        await load();
        retry.reset();
        if (!closed) changes.loaded();
      } catch (error) {
        if (!closed) changes.loaded(error);
        if (!closed && retry.schedule(error)) wanted = false;
      }
      const took = performance.now() - started;
      await new Promise((resolve) => setTimeout(resolve, Math.max(PAUSE_MS, took)));
    }
    busy = false;
  };
  /** @param {Event} event */
  const changed = (event) => {
    const { detail } = /** @type {CustomEvent<Change[]>} */ (event);
    if (!retry.pending && detail.some(({ id }) => id === runId)) reload();
  };
  const reconnected = () => {
    retry.reset();
    tileRetry.reset();
    reload();
  };
  changes.addEventListener("runs", changed);
  changes.addEventListener("reconnected", reconnected);
  return () => {
    closed = true;
    retry.cancel();
    changes.loaded();
    changes.removeEventListener("runs", changed);
    changes.removeEventListener("reconnected", reconnected);
  };
}
