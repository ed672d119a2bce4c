// The browser's address and history: pages, their filters and ranges can be linked to.

/**
 * @typedef {object} PageContext the arguments with which a page is opened
 * @property {import("./live.js").ChangeStream} changes
 * @property {Record<string, string>} names values of the placeholders in the route's path
 *
 * @typedef {object} OpenPage a page that is shown
 * @property {() => void} close
 * @property {() => void} [queryChanged] called after a link to another query of the same path; without it
 *   the page is opened again
 */

const CHANGED = "gradwatch:address";

/** Return the current path and query. */
export function current() {
  return { path: location.pathname, query: new URLSearchParams(location.search) };
}

const pathAndQuery = () => location.pathname + location.search;

/** Path and query that are shown. A link to a place within the page (#main) fires popstate too, but changes neither. */
let shown = pathAndQuery();

/** Remember in the history how far this page is scrolled. */
function keepPlace() {
  try {
    history.replaceState({ ...history.state, scroll: scrollY }, "");
  } catch {
    // The history has changed too often for this browser.
  }
}

/** Return how far the page of the current address was scrolled when it was left. */
export const place = () => Number(history.state?.scroll ?? 0);

/** Go to another page of this site. @param {string} url */
export function go(url) {
  keepPlace();
  history.pushState(null, "", url);
  shown = pathAndQuery();
  dispatchEvent(new Event(CHANGED));
}

/**
 * Change parts of the query without a new entry in the history.
 * @param {Record<string, string | number | null>} changes null and "" remove a parameter
 */
export function setQuery(changes) {
  const { path, query } = current();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") query.delete(name);
    else query.set(name, String(value));
  }
  const written = query.toString();
  if (written !== new URLSearchParams(location.search).toString()) {
    try {
      history.replaceState(history.state, "", written ? `${path}?${written}` : path);
    } catch {
      // The address has changed too often for this browser: it stays behind until the next change.
    }
  }
  shown = pathAndQuery();
}

/**
 * Open links within this site without loading the document again.
 * @param {() => void} show shows the current address @param {(path: string) => boolean} isPage
 */
export function followLinks(show, isPage) {
  history.scrollRestoration = "manual"; // the browser would scroll before the page is drawn
  addEventListener("pagehide", keepPlace);
  addEventListener("popstate", () => {
    if (pathAndQuery() === shown) return;
    shown = pathAndQuery();
    show();
  });
  addEventListener(CHANGED, show);
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (!link || link.origin !== location.origin || link.target || link.hash || event.defaultPrevented) return;
    if (event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    if (!isPage(link.pathname)) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
}

/** Return a whole number of the query, or null. @param {URLSearchParams} query @param {string} name */
export function wholeNumber(query, name) {
  const text = query.get(name);
  return text !== null && /^\d{1,16}$/.test(text) ? Number(text) : null;
}

/** Set the title of the browser's tab. @param {string} title */
export function setTitle(title) {
  document.title = `${title} · gradwatch`;
}
