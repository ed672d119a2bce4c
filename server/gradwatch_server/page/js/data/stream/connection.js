// One event stream from the server, under watch: it is opened again when it breaks off, and when it falls silent.
//
// A connection may die without a word: a VPN that goes away, a NAT that forgets, a computer that sleeps. So the server
// sends a beat when it has no news, and says how often; who hears nothing for longer has lost the connection.

/**
 * @typedef {{id: string, project: string, last_step: number | null, sample_count: number}} Change one run
 * @typedef {object} StreamMessage
 * @property {"word" | "lost" | "refused"} kind word: the server was heard; refused: it wants a login first
 * @property {Change[]} [changes] the runs that have changed
 * @property {number} [silenceMs] after so long without a word the connection is dead
 */

const RECONNECT_MS = [500, 1000, 2000, 5000];
const OPENING_MS = 30_000;
const MISSED_BEATS = 2.5;
const LONGEST_TIMER_MS = 2 ** 31 - 1; // browsers let a longer one fire at once

export class Connection {
  /** @param {string} url @param {(message: StreamMessage) => void} receive is called with everything that happens */
  constructor(url, receive) {
    this.url = url;
    this.receive = receive;
    this.failures = 0;
    this.silenceMs = OPENING_MS;
    /** @type {StreamMessage | null} */
    this.latest = null;
    /** @type {EventSource | null} */
    this.source = null;
    /** The watchdog while the stream is open, else the next attempt. */
    this.timer = 0;
    this.open();
  }

  open() {
    const source = new EventSource(this.url);
    this.source = source;
    this.silenceMs = OPENING_MS;
    this.watch(source);
    source.addEventListener("beat", (event) => {
      this.silenceMs = Math.min(JSON.parse(event.data).seconds * 1000 * MISSED_BEATS, LONGEST_TIMER_MS);
      this.heard(source, []);
    });
    source.addEventListener("runs", (event) => this.heard(source, JSON.parse(event.data)));
    // A closed connection was refused; one that was cut off would reconnect by itself, but unwatched.
    source.addEventListener("error", () => this.failed(source, source.readyState === EventSource.CLOSED));
  }

  /** @param {EventSource} source @param {Change[]} changes */
  heard(source, changes) {
    if (source !== this.source) return;
    this.failures = 0;
    this.watch(source);
    this.tell({ kind: "word", changes, silenceMs: this.silenceMs });
  }

  /** @param {EventSource} source */
  watch(source) {
    clearTimeout(this.timer);
    this.timer = Number(setTimeout(() => this.failed(source, false), this.silenceMs));
  }

  /** @param {EventSource} source @param {boolean} refused */
  failed(source, refused) {
    source.close();
    if (source !== this.source) return;
    this.close();
    this.tell({ kind: refused ? "refused" : "lost" });
    const wait = RECONNECT_MS[Math.min(this.failures++, RECONNECT_MS.length - 1)];
    this.timer = Number(setTimeout(() => this.open(), wait));
  }

  /** @param {StreamMessage} message */
  tell(message) {
    this.latest = { ...message, changes: [] };
    this.receive(message);
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }
}
