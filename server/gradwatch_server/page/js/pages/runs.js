// The runs: a live table, filtered and searched, up to four of them to compare.

import * as address from "../data/navigation.js";
import * as api from "../data/api.js";
import { el, fill } from "../dom/elements.js";
import { ago, count, measured, moment } from "../data/format.js";
import { drop, Sparks } from "../charts/sparkline.js";

/** @typedef {import("../data/api.js").Run} Run */

const MOST_COMPARED = 4;
const COLUMNS = ["", "Run", "Project", "State", "Step", "Loss", "Worst rule", "Last seen"];

/** @param {HTMLElement} main @param {import("../data/live.js").Live} live */
export async function runsView(main, live) {
  document.title = "Runs · gradwatch";
  const { query } = address.here();
  /** @type {Run[]} */
  let runs = [];
  const chosen = new Set();
  const sparks = new Sparks();
  const search = el("input", {
    type: "search",
    placeholder: "Search runs",
    "aria-label": "Search runs",
    value: query.get("q") ?? "",
  });
  const state = select("State", ["", "running", "stalled", "finished"], query.get("state") ?? "");
  const project = select("Project", [""], "");
  const compare = el(
    "button",
    { class: "action", disabled: true, onclick: () => address.go(`/?compare=${[...chosen].join(",")}`) },
    "Compare",
  );
  const rows = el("tbody");
  const head = el(
    "tr",
    null,
    COLUMNS.map((name) => el("th", { scope: "col" }, name || el("span", { class: "hidden-text" }, "Compare"))),
  );
  const table = el(
    "table",
    { class: "runs" },
    el("caption", { class: "hidden-text" }, "Runs, the one seen last first"),
    el("thead", null, head),
    rows,
  );
  const none = el("div", { class: "empty", hidden: true });
  /** @type {Map<string, HTMLTableRowElement>} */
  const made = new Map();

  const list = () => {
    const wanted = runs.filter((run) => matches(run, search.value, state.value, project.value));
    const current = new Set(wanted.map((run) => run.id));
    for (const [id, row] of made) if (!current.has(id)) drop(made, id, row);
    wanted.forEach((run, index) => {
      const row = made.get(run.id) ?? begun(run, sparks, toggle);
      made.set(run.id, row);
      renew(row, run, sparks);
      if (rows.children[index] !== row) rows.insertBefore(row, rows.children[index] ?? null);
    });
    choose();
    table.hidden = wanted.length === 0;
    none.hidden = wanted.length > 0;
    fill(none, runs.length ? "No run matches." : welcome());
    address.note({ q: search.value || null, state: state.value || null, project: project.value || null });
  };
  /** @param {string} id @param {boolean} on */
  const toggle = (id, on) => {
    if (on) chosen.add(id);
    else chosen.delete(id);
    choose();
  };
  const choose = () => {
    compare.disabled = chosen.size < 2;
    for (const [id, row] of made) {
      const box = /** @type {HTMLInputElement} */ (row.querySelector("input"));
      box.checked = chosen.has(id);
      box.disabled = chosen.size >= MOST_COMPARED && !box.checked;
    }
  };
  const load = async () => {
    runs = await api.runs();
    const names = [...new Set(runs.map((run) => run.project))].sort();
    const kept = project.value || (query.get("project") ?? "");
    if (
      names.join("\n") !==
      [...project.options]
        .slice(1)
        .map((option) => option.value)
        .join("\n")
    ) {
      fill(
        project,
        el("option", { value: "" }, "All projects"),
        names.map((name) => el("option", { value: name }, name)),
      );
      project.value = names.includes(kept) ? kept : "";
    }
    list();
  };
  for (const control of [search, state, project]) control.addEventListener("input", list);

  await load();
  fill(
    main,
    el(
      "div",
      { class: "head" },
      el("h1", null, "Runs"),
      el("div", { class: "tools" }, search, project, state, compare),
    ),
    el("div", { class: "card scroll" }, table, none),
  );
  return { close: kept(live, load) };
}

/** Load again when something changes, at most once a second. @param {import("../data/live.js").Live} live @param {() => Promise<void>} load */
export function kept(live, load) {
  let due = 0;
  const soon = () => {
    due ||= window.setTimeout(
      () =>
        load()
          .catch(() => undefined)
          .finally(() => (due = 0)),
      700,
    );
  };
  live.addEventListener("runs", soon);
  live.addEventListener("again", soon);
  const clock = setInterval(soon, 15_000);
  return () => {
    live.removeEventListener("runs", soon);
    live.removeEventListener("again", soon);
    clearInterval(clock);
    clearTimeout(due);
  };
}

/** @param {string} label @param {string[]} values @param {string} value */
function select(label, values, value) {
  const made = el(
    "select",
    { "aria-label": label },
    values.map((each) => el("option", { value: each }, each || `All ${label.toLowerCase()}s`)),
  );
  made.value = value;
  return made;
}

/** @param {Run} run @param {string} search @param {string} state @param {string} project */
function matches(run, search, state, project) {
  const text = `${run.project} ${run.name} ${run.id}`.toLowerCase();
  if (state && run.state !== state) return false;
  return (
    (!project || run.project === project) &&
    search
      .toLowerCase()
      .split(/\s+/)
      .every((word) => text.includes(word))
  );
}

/** @param {Run} run @param {Sparks} sparks @param {(id: string, on: boolean) => void} toggle */
function begun(run, sparks, toggle) {
  const box = el("input", {
    type: "checkbox",
    "aria-label": `Compare ${run.name}`,
    oninput: () => toggle(run.id, box.checked),
  });
  const row = el(
    "tr",
    { "data-run": run.id },
    el("td", { class: "choose" }, box),
    el("th", { scope: "row" }, el("a", { href: `/runs/${run.id}` })),
  );
  for (const name of COLUMNS.slice(2)) row.append(el("td", { "data-label": name }));
  sparks.watch(row, run.id);
  return row;
}

/** @param {HTMLTableRowElement} row @param {Run} run @param {Sparks} sparks */
function renew(row, run, sparks) {
  const [, name, project, state, step, loss, rule, seen] = row.cells;
  /** @type {HTMLElement} */ (name.firstElementChild).textContent = run.name;
  project.textContent = run.project;
  fill(state, stateSign(run));
  step.textContent = count(run.last_step);
  if (!loss.firstChild) loss.append(sparks.canvas(run.id), el("span", { class: "value" }));
  /** @type {HTMLElement} */ (loss.lastElementChild).textContent =
    "loss" in run.scalars ? measured(run.scalars.loss) : "–";
  fill(
    rule,
    run.worst_rule
      ? el("span", { class: `chip ${run.worst_severity}` }, run.worst_rule)
      : el("span", { class: "soft" }, "none"),
  );
  seen.textContent = ago(run.last_seen_at);
  seen.title = moment(run.last_seen_at);
  sparks.changed(run.id, run.last_step);
}

/** @param {Run} run */
export function stateSign(run) {
  const text = run.status && run.status !== "completed" ? run.status : run.state;
  return el("span", { class: `state ${text}` }, text);
}

/** What to do where nothing has reported yet. */
function welcome() {
  const code = `import gradwatch\nagent = gradwatch.attach(model, optimizer, url="${location.origin}")`;
  return el(
    "div",
    { class: "welcome" },
    el("h2", null, "No run has reported yet"),
    el("p", null, "Add this before the training loop:"),
    el("pre", { tabindex: 0 }, code),
  );
}
