// Entry point: opens the page of the current address, after a login if the server asks for a token.

import * as api from "./data/api.js";
import { ChangeStream } from "./data/live.js";
import * as navigation from "./data/navigation.js";
import { el, fill } from "./dom/elements.js";
import { openLogin, showSession } from "./pages/login.js";
import { findRoute, ROUTES } from "./routes.js";

/** @typedef {import("./data/navigation.js").OpenPage} OpenPage */

const RETRY_MS = 1000;
const COUNT_MS = 1000;

/** @param {string} selector */
const element = (selector) => /** @type {HTMLElement} */ (document.querySelector(selector));
const main = element("#main");
const bar = { links: element("nav"), session: element("#session") };
const changes = new ChangeStream(element("#connection"), element("#age"));
const links = ROUTES.filter(({ link }) => link).map((route) => {
  const number = el("span", { class: "count", hidden: true });
  return { route, number, anchor: el("a", { href: route.path }, route.link, " ", number) };
});

/** @type {OpenPage | null} */
let page = null;
let openPath = "";
let openings = 0;
let countTimer = 0;

/** Open the page of the current address; an open page of the same path is only told that the query has changed. */
async function show() {
  if (!api.session.scope) return;
  const { path, query } = navigation.current();
  if (page?.queryChanged && path === openPath) {
    page.queryChanged();
    return;
  }
  const first = openPath === "";
  closePage();
  openPath = path;
  const opening = openings;
  markCurrentLink(path);
  try {
    const opened = await openPage(path, query);
    if (opening !== openings) opened.close();
    else page = opened;
  } catch (error) {
    if (opening === openings) showError(error);
    return;
  }
  if (navigation.place() > 0) scrollTo(0, navigation.place());
  if (!first) main.focus({ preventScroll: true });
}

/** @param {string} path @param {URLSearchParams} query @returns {Promise<OpenPage>} */
async function openPage(path, query) {
  const found = findRoute(path, query);
  if (!found) throw new Error(`There is no page at ${path}.`);
  navigation.setTitle(found.route.title);
  const { open } = await found.route.page;
  scrollTo(0, 0); // at once: a page shows its head before all of it is there
  return open(main, { changes, names: found.names });
}

function closePage() {
  page?.close();
  page = null;
  openPath = "";
  openings++; // a page that is still loading is closed as soon as it is open
}

/** @param {unknown} error */
function showError(error) {
  const [title, text] =
    error instanceof api.ApiError ? [error.title, error.message] : ["Cannot show this", String(error)];
  const runs = el("p", null, el("a", { href: "/" }, "All runs"));
  fill(main, el("div", { class: "empty" }, el("h1", null, title), el("p", null, text), runs));
}

/** @param {string} path */
function markCurrentLink(path) {
  for (const { route, anchor } of links) {
    if (route.path === path) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
}

/** Show the numbers beside the links. */
async function showBadges() {
  countTimer = 0;
  for (const { route, number } of links) {
    const counted = await route.badge?.count().catch(() => undefined);
    if (counted === undefined) continue;
    number.hidden = counted === 0;
    number.textContent = String(counted);
    number.setAttribute("aria-label", `${counted} ${route.badge?.label}`);
  }
}

function scheduleBadges() {
  countTimer ||= window.setTimeout(showBadges, COUNT_MS);
}

/** Show the pages that the session allows, or the login. */
function enter() {
  const { scope, project } = api.session;
  bar.links.hidden = scope === null;
  for (const { route, anchor } of links) anchor.hidden = Boolean(route.allProjects) && project !== null;
  showSession(bar.session);
  if (scope === null) {
    closePage();
    changes.stop();
    openLogin(main, enter);
    return;
  }
  changes.start();
  showBadges();
  show();
}

/** Ask the server for the session, again and again until it answers. */
async function begin() {
  try {
    await api.renewSession();
    enter();
  } catch {
    fill(main, el("p", { class: "empty" }, "The server does not answer, trying again"));
    setTimeout(begin, RETRY_MS);
  }
}

/** After a request was refused: ask for a token if the one in use is no longer valid. */
async function checkSession() {
  const session = await api.renewSession().catch(() => null);
  if (session && session.scope === null) enter();
}

fill(
  bar.links,
  links.map(({ anchor }) => anchor),
);
changes.addEventListener("runs", scheduleBadges);
changes.addEventListener("reconnected", scheduleBadges);
changes.addEventListener("reconnected", () => page || show());
addEventListener(api.LOGIN_REQUIRED, checkSession);
navigation.followLinks(show, (path) => findRoute(path) !== null);
begin();
