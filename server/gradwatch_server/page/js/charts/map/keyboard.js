// Keys on the map: everything that the pointer can do.

/** @typedef {import("./layer-map.js").LayerMap} LayerMap */

/** @param {LayerMap} map */
export function listen(map) {
  map.over.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !pressed(map, event.key)) return;
    event.preventDefault();
  });
}

/** @param {LayerMap} map @param {string} key @returns {boolean} whether it meant something */
function pressed(map, key) {
  const { view } = map;
  const { from, to, step } = view.now;
  const centre = step !== null && step >= from && step < to ? step + 0.5 : (from + to) / 2;
  /** @type {Record<string, () => void>} */
  const keys = {
    "+": () => view.zoom(0.5, centre),
    "=": () => view.zoom(0.5, centre),
    "-": () => view.zoom(2, centre),
    0: () => view.all(),
    PageDown: () => view.pan(0.5),
    PageUp: () => view.pan(-0.5),
    Home: () => view.look(0, to - from),
    End: () => view.look(view.now.end - (to - from), view.now.end),
    ArrowRight: () => walk(map, 1),
    ArrowLeft: () => walk(map, -1),
    ArrowDown: () => choose(map, 1),
    ArrowUp: () => choose(map, -1),
    Escape: () => view.set({ step: null, pinned: null, parameter: null, kept: null, alert: null }),
  };
  if (!Object.hasOwn(keys, key)) return false;
  keys[key]();
  return true;
}

/** Move the crosshair to the next sample that has a pixel of its own. @param {LayerMap} map @param {number} way */
function walk({ view, tile, frame }, way) {
  const { from, to, end } = view.now;
  const pixel = Math.max(1, (to - from) / (frame.width - frame.left - frame.right));
  const start = view.now.step ?? Math.floor((from + to) / 2);
  const steps = tile?.steps ?? [];
  const next = way > 0 ? steps.find((step) => step >= start + pixel) : steps.findLast((step) => step <= start - pixel);
  const step = Math.min(Math.max(next ?? start, 0), end - 1);
  view.set({ step, pinned: step });
  if (step < from || step >= to) view.look(step - (to - from) / 2, step + (to - from) / 2);
}

/** @param {LayerMap} map @param {number} way */
function choose({ view, tile }, way) {
  const names = tile?.parameters ?? [];
  const at = view.now.parameter === null ? -1 : names.indexOf(view.now.parameter);
  view.set({ parameter: names[Math.min(Math.max(at + way, 0), names.length - 1)] ?? null });
}
