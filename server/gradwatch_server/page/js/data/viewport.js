// The state that all parts of a run's page share: range of steps, crosshair, parameter, statistic.

/**
 * @typedef {object} ViewportState
 * @property {number} from step at the left edge
 * @property {number} to step at the right edge, exclusive
 * @property {number} end one past the last step of the run
 * @property {number | null} step the crosshair's step
 * @property {number | null} pinned step to which the crosshair returns when the pointer leaves
 * @property {string | null} parameter name of the chosen parameter
 * @property {string | null} kept names of the parameters shown beside the chosen one, one a line
 * @property {import("./statistics.js").Statistic} statistic
 * @property {Cell} cell
 * @property {string | null} alert id of the open alert
 * @property {boolean} following whether the right edge moves on with the run
 */

/** @typedef {"max" | "min" | "last"} Cell the value of a bucket that the map shows */

/** @typedef {(state: ViewportState, before: ViewportState) => void} Listener */

const NARROWEST_STEPS = 2;

export class Viewport {
  /** @param {ViewportState} state */
  constructor(state) {
    this.state = state;
    /** @type {Set<Listener>} */
    this.listeners = new Set();
  }

  /** Call a listener after every change. @param {Listener} listener */
  subscribe(listener) {
    this.listeners.add(listener);
  }

  /** @param {Partial<ViewportState>} changes */
  set(changes) {
    const before = this.state;
    const state = { ...before, ...changes };
    if (Object.keys(changes).every((key) => Reflect.get(before, key) === Reflect.get(state, key))) return;
    this.state = state;
    for (const listener of this.listeners) {
      try {
        listener(state, before);
      } catch (error) {
        reportError(error); // the other parts of the page follow all the same
      }
    }
  }

  /**
   * Show a range of steps, moved and widened to be at least two steps of the run.
   * @param {number} from @param {number} to
   */
  showRange(from, to) {
    const { end } = this.state;
    const width = Math.min(Math.max(to - from, Math.min(NARROWEST_STEPS, end)), end);
    const start = Math.min(Math.max(from, 0), Math.max(0, end - width));
    this.set({ from: start, to: start + width, following: start + width >= end });
  }

  /** Zoom so that `step` stays in its place. @param {number} factor below 1 zooms in @param {number} step */
  zoom(factor, step) {
    const { from, to, end } = this.state;
    const width = Math.min(Math.max((to - from) * factor, NARROWEST_STEPS), end);
    const share = (step - from) / (to - from);
    this.showRange(step - share * width, step - share * width + width);
  }

  /** Move by a share of the visible range. @param {number} share */
  pan(share) {
    const { from, to } = this.state;
    const steps = (to - from) * share;
    this.showRange(from + steps, to + steps);
  }

  /** Show all steps. */
  showAll() {
    this.showRange(0, this.state.end);
  }

  /** Add new steps; the range follows if it reached to the end. @param {number} end one past its last step */
  extend(end) {
    const { end: before, from, to, following } = this.state;
    if (end <= before) return;
    this.set({ end });
    if (following) this.showRange(from === 0 ? 0 : end - (to - from), end);
  }

  /** Return the step to zoom around: the middle of the crosshair's step where it is visible, else of the range. */
  get centre() {
    const { from, to, step } = this.state;
    return step !== null && step >= from && step < to ? step + 0.5 : (from + to) / 2;
  }
}

/**
 * Return whether a part of the crosshair's step is in view.
 * @param {Pick<ViewportState, "step" | "from" | "to">} state
 */
export const inView = ({ step, from, to }) => step !== null && step + 1 > from && step < to;

/** Return whether another range of steps is visible. @param {ViewportState} state @param {ViewportState} before */
export const rangeChanged = (state, before) => state.from !== before.from || state.to !== before.to;
