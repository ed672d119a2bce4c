// The login: a token is asked for once; the server keeps it in a cookie that no script can read.

import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";

/** @param {HTMLElement} main @param {() => void} done */
export function loginView(main, done) {
  document.title = "Log in · gradwatch";
  const token = el("input", {
    id: "token",
    type: "password",
    autocomplete: "current-password",
    spellcheck: "false",
    required: true,
    "aria-describedby": "token-help",
  });
  const said = el("p", { class: "wrong", role: "alert" });
  const button = el("button", { class: "action" }, "Log in");
  /** @param {Event} event */
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    fill(said);
    try {
      await api.logIn(token.value.trim());
      done();
    } catch (error) {
      fill(said, error instanceof Error ? error.message : String(error));
      button.disabled = false;
      token.select();
    }
  };
  const form = el(
    "form",
    { class: "card pad login", onsubmit: submit },
    el("h1", null, "Log in"),
    el("label", { for: "token" }, "Token"),
    token,
    button,
    said,
    el(
      "p",
      { class: "soft", id: "token-help" },
      "A token with scope read shows everything; one with scope admin may also silence, acknowledge and send again. ",
      el("code", null, "gradwatch token create --scope admin"),
      " makes one.",
    ),
  );
  fill(main, form);
  token.focus();
}

/** The button that forgets the token, where there is one. @param {HTMLElement} holder */
export function logOutButton(holder) {
  const { login, scope, project } = api.session;
  const leave = async () => {
    await api.logOut();
    location.assign("/");
  };
  const may = `${scope === "admin" ? "admin" : "read only"}${project === null ? "" : `, project ${project}`}`;
  fill(
    holder,
    login && scope && el("span", { class: "soft" }, may),
    login && scope && el("button", { type: "button", onclick: leave }, "Log out"),
  );
}
