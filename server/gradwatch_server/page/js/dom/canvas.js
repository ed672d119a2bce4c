// Drawing on a canvas: the screen's resolution, the theme's colours, one drawing a frame.

/**
 * Clear a canvas and return its context, scaled so that one unit is a CSS pixel and nothing is blurred.
 * @param {HTMLCanvasElement} canvas @param {number} width @param {number} height
 */
export function prepareCanvas(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [wide, high] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
  }
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export const FONT = "12px system-ui, sans-serif";

/** Return a colour of the current theme. @param {string} name */
export function themeColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Return a function that calls `work` in the next frame, once however often it is called. @param {() => void} work */
export function oncePerFrame(work) {
  let request = 0;
  return () => {
    request ||= requestAnimationFrame(() => {
      request = 0;
      work();
    });
  };
}

const THEMES = ["(prefers-color-scheme: dark)", "(forced-colors: active)", "print"].map((query) => matchMedia(query));

/**
 * Draw again when the theme changes, for as long as the element is on the page: between light and dark, to forced
 * colours, to paper. Paper shows what is drawn at once: `draw` must not wait for a frame.
 * @param {Element} element @param {() => void} draw
 */
export function onThemeChange(element, draw) {
  const changed = () => {
    if (element.isConnected) draw();
    else for (const theme of THEMES) theme.removeEventListener("change", changed);
  };
  for (const theme of THEMES) theme.addEventListener("change", changed);
}
