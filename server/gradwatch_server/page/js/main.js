// The address says which view is shown.

import * as address from "./data/navigation.js";
import { alertsView } from "./pages/alerts.js";
import * as api from "./data/api.js";
import { compared, compareView } from "./pages/compare.js";
import { el, fill } from "./dom/elements.js";
import { Live } from "./data/live.js";
import { loginView, logOutButton } from "./pages/login.js";
import { runView } from "./pages/run.js";
import { runsView } from "./pages/runs.js";
import { serverView } from "./pages/server.js";

/** @typedef {{close: () => void, arrive?: () => void}} Shown a view; `arrive`: its query has changed */

const main = /** @type {HTMLElement} */ (document.querySelector("#main"));
const firing = /** @type {HTMLElement} */ (document.querySelector("#firing"));
const bar = {
  session: /** @type {HTMLElement} */ (document.querySelector("#session")),
  server: /** @type {HTMLElement} */ (document.querySelector("#server")),
  nav: /** @type {HTMLElement} */ (document.querySelector("nav")),
};
const live = new Live(/** @type {HTMLElement} */ (document.querySelector("#connection")));
/** @type {Shown | null} */
let shown = null;
let shownPath = "";

/** @param {string} path @returns {Promise<Shown>} */
async function open(path) {
  const run = /^\/runs\/([^/]+)$/.exec(path);
  if (run) return runView(main, decodeURIComponent(run[1]), live);
  if (path === "/alerts") return alertsView(main, live);
  if (path === "/server") return serverView(main, live);
  return compared().length ? compareView(main, compared(), live) : runsView(main, live);
}

async function show() {
  if (!api.session.scope) return;
  const { path } = address.here();
  if (shown && path === shownPath && shown.arrive) {
    shown.arrive();
    return;
  }
  shown?.close();
  shown = null;
  const first = shownPath === "";
  shownPath = path;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === path) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    const opened = await open(path);
    if (path !== shownPath) opened.close();
    else shown = opened;
    if (!first) main.focus({ preventScroll: true });
  } catch (error) {
    const [title, text] =
      error instanceof api.Refused ? [error.title, error.message] : ["Cannot show this", String(error)];
    fill(
      main,
      el(
        "div",
        { class: "empty" },
        el("h1", null, title),
        el("p", null, text),
        el("p", null, el("a", { href: "/" }, "All runs")),
      ),
    );
  }
}

/** The number of alerts that fire, in the bar. */
async function countFiring() {
  const listed = await api.alerts({ state: "firing" }).catch(() => null);
  if (!listed) return;
  firing.hidden = listed.length === 0;
  firing.textContent = String(listed.length);
  firing.setAttribute("aria-label", `${listed.length} firing`);
}

let due = 0;
function countSoon() {
  due ||= window.setTimeout(() => {
    due = 0;
    countFiring();
  }, 1000);
}

/** Show what the session allows, or ask for a token. */
function enter() {
  const allowed = api.session.scope !== null;
  bar.nav.hidden = !allowed;
  bar.server.hidden = api.session.project !== null;
  logOutButton(bar.session);
  if (!allowed) {
    shown?.close();
    shown = null;
    shownPath = "";
    live.stop();
    loginView(main, enter);
    return;
  }
  live.start();
  countFiring();
  show();
}

/** Ask the server what this page may do; again until it answers. */
async function begin() {
  try {
    await api.renewSession();
    enter();
  } catch {
    fill(main, el("p", { class: "empty" }, "The server does not answer, trying again"));
    setTimeout(begin, 1000);
  }
}

/** Something was refused: ask for a token again where this one is no longer worth anything. */
async function locked() {
  const now = await api.renewSession().catch(() => null);
  if (now && now.scope === null) enter();
}

live.addEventListener("runs", countSoon);
live.addEventListener("again", countSoon);
live.addEventListener("again", () => shown || show());
addEventListener(api.LOCKED, locked);
address.follow(show);
begin();
