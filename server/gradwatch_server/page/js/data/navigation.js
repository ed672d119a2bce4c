// Every view is an address: what is shown can be read from the location and written back to it.

/** @typedef {{path: string, query: URLSearchParams}} Address */

/** @returns {Address} */
export function here() {
  return { path: location.pathname, query: new URLSearchParams(location.search) };
}

/** What is shown: a link within the page changes the address, too, but for that nothing is drawn anew. */
let shown = text();

function text() {
  return location.pathname + location.search;
}

/** Go to another view. @param {string} url */
export function go(url) {
  history.pushState(null, "", url);
  shown = text();
  dispatchEvent(new Event("gradwatch:address"));
}

/**
 * Change parts of the query without a new entry in the history.
 * @param {Record<string, string | number | null>} changes null removes
 */
export function note(changes) {
  const { path, query } = here();
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") query.delete(name);
    else query.set(name, String(value));
  }
  const written = query.toString();
  if (written !== new URLSearchParams(location.search).toString())
    history.replaceState(null, "", written ? `${path}?${written}` : path);
  shown = text();
}

/** Let links of this page change the view in place. @param {() => void} show */
export function follow(show) {
  addEventListener("popstate", () => {
    if (text() === shown) return;
    shown = text();
    show();
  });
  addEventListener("gradwatch:address", show);
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a") : null;
    if (!link || link.origin !== location.origin || link.target || event.defaultPrevented) return;
    if (event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    if (!/^\/($|runs\/|alerts$|server$)/.test(link.pathname) || link.hash) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
}

/** A whole number of the query, or null. @param {URLSearchParams} query @param {string} name */
export function whole(query, name) {
  const text = query.get(name);
  return text !== null && /^\d{1,16}$/.test(text) ? Number(text) : null;
}
