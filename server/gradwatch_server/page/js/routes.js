// The pages of this site. A new page is a file in pages/ and a line in ROUTES.

import * as api from "./data/api.js";

/** @typedef {import("./data/navigation.js").PageContext} PageContext */
/** @typedef {import("./data/navigation.js").OpenPage} OpenPage */
/** @typedef {{open: (main: HTMLElement, context: PageContext) => Promise<OpenPage>}} PageModule */
/** @typedef {{label: string, count: () => Promise<number>}} Badge a number beside a link; hidden while it is 0 */
/**
 * @typedef {object} Route
 * @property {string} path `{name}` stands for one segment, which the page finds in its context
 * @property {string} [query] a parameter that the query must have
 * @property {string} title of the browser's tab
 * @property {string} [link] text of the link in the bar
 * @property {Badge} [badge]
 * @property {boolean} [allProjects] hides the link from a token of one project
 * @property {Promise<PageModule>} page
 */

/** @type {Badge} */
const firing = { label: "firing", count: async () => (await api.alerts({ state: "firing" })).length };

/**
 * Return the module of a page, which is on its way. If it cannot be fetched, the error is that of whoever opens the page.
 * @param {Promise<PageModule>} module
 */
function fetched(module) {
  module.catch(() => undefined);
  return module;
}

/** The first route that matches is opened. @type {Route[]} */
export const ROUTES = [
  { path: "/", query: "compare", title: "Compare", page: fetched(import("./pages/compare.js")) },
  { path: "/", title: "Runs", link: "Runs", page: fetched(import("./pages/runs.js")) },
  { path: "/runs/{run}", title: "Run", page: fetched(import("./pages/run.js")) },
  { path: "/alerts", title: "Alerts", link: "Alerts", badge: firing, page: fetched(import("./pages/alerts.js")) },
  { path: "/server", title: "Server", link: "Server", allProjects: true, page: fetched(import("./pages/server.js")) },
];

/**
 * Return the route of an address with the values of its placeholders, or null.
 * @param {string} path @param {URLSearchParams} [query]
 */
export function findRoute(path, query = new URLSearchParams()) {
  for (const route of ROUTES) {
    if (route.query && !query.get(route.query)) continue;
    const pattern = route.path.replace(/\{(\w+)\}/g, "(?<$1>[^/]+)");
    const match = new RegExp(`^${pattern}$`).exec(path);
    if (!match) continue;
    const names = Object.entries(match.groups ?? {}).map(([name, value]) => [name, decodeURIComponent(value)]);
    return { route, names: /** @type {Record<string, string>} */ (Object.fromEntries(names)) };
  }
  return null;
}
