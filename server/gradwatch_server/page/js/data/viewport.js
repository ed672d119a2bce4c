// What a run's page looks at: one range of steps, one crosshair, one parameter; every part follows it.

/**
 * @typedef {object} Looking
 * @property {number} from step at the left edge
 * @property {number} to step at the right edge, exclusive
 * @property {number} end one past the last step of the run
 * @property {number | null} step the crosshair's step
 * @property {number | null} pinned a step that the crosshair returns to
 * @property {string | null} parameter the chosen parameter
 * @property {string | null} kept parameters whose series stay beside the chosen one's, one a line
 * @property {string} statistic
 * @property {"max" | "min" | "last"} cell
 * @property {string | null} alert id of the alert that is looked at
 * @property {boolean} following whether the right edge follows the run
 */

/** @typedef {(now: Looking, before: Looking) => void} Listener */

export class View {
  /** @param {Looking} looking */
  constructor(looking) {
    this.now = looking;
    /** @type {Set<Listener>} */
    this.listeners = new Set();
  }

  /** @param {Listener} listener */
  subscribe(listener) {
    this.listeners.add(listener);
  }

  /** @param {Partial<Looking>} changes */
  set(changes) {
    const before = this.now;
    const now = { ...before, ...changes };
    if (Object.keys(changes).every((key) => Reflect.get(before, key) === Reflect.get(now, key))) return;
    this.now = now;
    for (const listener of this.listeners) listener(now, before);
  }

  /** Look at a range of steps: at least two steps wide, within the run. @param {number} from @param {number} to */
  look(from, to) {
    const { end } = this.now;
    const width = Math.min(Math.max(to - from, Math.min(2, end)), end);
    const start = Math.min(Math.max(from, 0), Math.max(0, end - width));
    this.set({ from: start, to: start + width, following: start + width >= end });
  }

  /** Zoom so that `step` stays where it is. @param {number} factor below 1 zooms in @param {number} step */
  zoom(factor, step) {
    const { from, to, end } = this.now;
    const width = Math.min(Math.max((to - from) * factor, 2), end);
    const share = (step - from) / (to - from);
    this.look(step - share * width, step - share * width + width);
  }

  /** Move by a share of what is seen. @param {number} share */
  pan(share) {
    const { from, to } = this.now;
    const by = (to - from) * share;
    this.look(from + by, to + by);
  }

  /** Look at everything. */
  all() {
    this.look(0, this.now.end);
  }

  /** The run has grown. @param {number} end */
  grow(end) {
    const { end: before, from, to, following } = this.now;
    if (end <= before) return;
    const whole = from === 0;
    this.set({ end });
    if (following) this.look(whole ? 0 : end - (to - from), end);
  }
}
