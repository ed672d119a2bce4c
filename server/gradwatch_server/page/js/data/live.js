// Live: the server tells which runs have changed. A lost connection says so, tries again and catches up.

import { LOCKED, streamAddress } from "./api.js";

const BACK_OFF_MS = [500, 1000, 2000, 5000];

/** Fires "runs" (detail: Change[]) for changes and "again" after a connection was lost and came back. */
export class Live extends EventTarget {
  /** @param {HTMLElement} sign where the state of the connection is shown */
  constructor(sign) {
    super();
    this.sign = sign;
    this.failures = 0;
    /** @type {EventSource | null} */
    this.source = null;
    this.timer = 0;
    this.lost = false;
    this.stopped = true;
    // A hidden tab gives its connection back: browsers allow a server only six of them.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.rest() : this.open()));
    addEventListener("pagehide", () => this.rest());
    addEventListener("pageshow", (event) => event.persisted && this.open());
  }

  start() {
    this.stopped = false;
    this.open();
  }

  /** Listen no more until it is started again. */
  stop() {
    this.stopped = true;
    this.rest();
    delete this.sign.dataset.state;
    this.sign.textContent = "";
  }

  open() {
    if (this.stopped || this.source || document.hidden) return;
    clearTimeout(this.timer);
    const source = new EventSource(streamAddress());
    this.source = source;
    source.addEventListener("open", () => this.opened());
    source.addEventListener("runs", (event) => {
      this.dispatchEvent(new CustomEvent("runs", { detail: JSON.parse(event.data) }));
    });
    source.addEventListener("error", () => this.failed(source));
  }

  opened() {
    this.failures = 0;
    this.show("live", "Live");
    if (this.lost) this.dispatchEvent(new Event("again"));
    this.lost = false;
  }

  /** @param {EventSource} source */
  failed(source) {
    if (source.readyState === EventSource.CLOSED) dispatchEvent(new Event(LOCKED)); // refused, not cut off
    source.close();
    if (this.source !== source) return;
    this.source = null;
    this.lost = true;
    this.show("lost", "Connection lost, trying again");
    this.timer = window.setTimeout(() => this.open(), BACK_OFF_MS[Math.min(this.failures++, BACK_OFF_MS.length - 1)]);
  }

  rest() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
    this.lost = true;
  }

  /** @param {"live" | "lost"} state @param {string} text */
  show(state, text) {
    if (this.sign.textContent === text) return;
    this.sign.dataset.state = state;
    this.sign.textContent = text;
  }
}
