// The login: it asks for a token, which the server keeps in a cookie that no script can read.

import * as api from "../data/api.js";
import { setTitle } from "../data/navigation.js";
import { button, el, fill } from "../dom/elements.js";

/** @param {HTMLElement} main @param {() => void} done is called once the token was accepted */
export function openLogin(main, done) {
  setTitle("Log in");
  const token = el("input", {
    id: "token",
    type: "password",
    autocomplete: "current-password",
    spellcheck: "false",
    required: true,
    "aria-describedby": "token-help",
  });
  const error = el("p", { class: "wrong", role: "alert" });
  const logIn = el("button", { class: "action" }, "Log in");
  /** @param {Event} event */
  const onsubmit = async (event) => {
    event.preventDefault();
    logIn.disabled = true;
    fill(error);
    try {
      await api.logIn(token.value.trim());
      done();
    } catch (refusal) {
      fill(error, refusal instanceof Error ? refusal.message : String(refusal));
      logIn.disabled = false;
      token.select();
    }
  };
  const help = el(
    "p",
    { class: "soft", id: "token-help" },
    "A token with scope read shows everything; one with scope admin can also silence, acknowledge and send again. ",
    "Make one with ",
    el("code", null, "gradwatch token create --scope admin"),
    ".",
  );
  const label = el("label", { for: "token" }, "Token");
  fill(
    main,
    el("form", { class: "card pad login", onsubmit }, el("h1", null, "Log in"), label, token, logIn, error, help),
  );
  token.focus();
}

/**
 * Show the scope of the token and the button to log out; nothing if the server needs no token.
 * @param {HTMLElement} holder
 */
export function showSession(holder) {
  const { login, scope, project } = api.session;
  if (!login || !scope) {
    fill(holder);
    return;
  }
  const logOut = async () => {
    await api.logOut();
    location.assign("/");
  };
  const allowed = scope === "admin" ? "admin" : "read only";
  const text = project === null ? allowed : `${allowed}, project ${project}`;
  fill(holder, el("span", { class: "soft" }, text), button("Log out", logOut));
}
