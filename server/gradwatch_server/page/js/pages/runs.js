// The list of runs, updated live, with a search, filters, and a choice of up to four runs to compare.

import { LossSparklines } from "../charts/sparkline.js";
import { runState } from "../controls/run-state.js";
import * as api from "../data/api.js";
import { ago, count, measured, moment, shorten } from "../data/format.js";
import { reloadOnChanges } from "../data/live.js";
import { current, go, setQuery } from "../data/navigation.js";
import { el, fill, select, tableHead } from "../dom/elements.js";

/** @typedef {import("../data/api.js").Run} Run */

const MOST_COMPARED = 4;
const COLUMNS = ["Run", "Project", "State", "Step", "Loss", "Worst rule", "Last seen"];
const LONGEST_OPTION = 40;
const STATES = ["running", "stalled", "finished"];

/** @param {HTMLElement} main @param {import("../data/navigation.js").PageContext} context */
export async function open(main, { changes }) {
  const list = new RunList(current().query);
  await list.load();
  fill(
    main,
    el("div", { class: "head" }, el("h1", null, "Runs"), el("div", { class: "tools" }, list.tools)),
    el("div", { class: "card scroll" }, list.table, list.empty),
  );
  return { close: reloadOnChanges(changes, () => list.load()) };
}

class RunList {
  /** @param {URLSearchParams} query */
  constructor(query) {
    this.query = query;
    /** @type {Run[]} */
    this.runs = [];
    /** Ids of the runs to compare. @type {Set<string>} */
    this.chosen = new Set();
    /** By the run's id. @type {Map<string, HTMLTableRowElement>} */
    this.rows = new Map();
    this.sparklines = new LossSparklines();

    const label = "Search runs";
    this.search = el("input", { type: "search", placeholder: label, "aria-label": label, value: query.get("q") ?? "" });
    this.project = filter("Project", []);
    this.state = filter("State", STATES);
    this.state.value = query.get("state") ?? "";
    const compare = () => go(`/?compare=${[...this.chosen].join(",")}`);
    this.compare = el("button", { class: "action", disabled: true, onclick: compare }, "Compare");
    this.tools = [this.search, this.project, this.state, this.compare];
    for (const control of [this.search, this.project, this.state]) control.addEventListener("input", () => this.draw());

    this.body = el("tbody");
    const head = tableHead([el("span", { class: "hidden-text" }, "Compare"), ...COLUMNS]);
    const caption = el("caption", { class: "hidden-text" }, "Runs, the one seen last first");
    this.table = el("table", { class: "runs" }, caption, head, this.body);
    this.sparklines.followTheme(this.table);
    this.empty = el("div", { class: "empty", hidden: true });
  }

  async load() {
    this.runs = await api.runs();
    this.listProjects();
    this.draw();
  }

  /** Offer the projects of all runs and keep the one that is chosen, at first that of the address. */
  listProjects() {
    const names = [...new Set(this.runs.map(({ project }) => project))].sort();
    const offered = [...this.project.options].slice(1).map(({ value }) => value);
    if (names.join("\n") === offered.join("\n")) return;
    const chosen = this.project.value || (this.query.get("project") ?? "");
    fill(this.project, ...filter("Project", names).options);
    this.project.value = names.includes(chosen) ? chosen : "";
  }

  /** Draw the runs that match the filters; rows that stay are kept. */
  draw() {
    const wanted = this.runs.filter((run) => this.matches(run));
    const ids = new Set(wanted.map(({ id }) => id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.remove();
      this.rows.delete(id);
    }
    wanted.forEach((run, index) => {
      const row = this.row(run);
      this.update(row, run);
      if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
    });
    this.updateChoice();
    this.table.hidden = wanted.length === 0;
    this.empty.hidden = wanted.length > 0;
    fill(this.empty, this.runs.length ? "No run matches." : welcome());
    setQuery({ q: this.search.value, state: this.state.value, project: this.project.value });
  }

  /** @param {Run} run */
  matches({ id, project, name, state }) {
    if (this.state.value && state !== this.state.value) return false;
    if (this.project.value && project !== this.project.value) return false;
    const text = `${project} ${name} ${id}`.toLowerCase();
    return this.search.value
      .toLowerCase()
      .split(/\s+/)
      .every((word) => text.includes(word));
  }

  /** Return the row of a run; it is made when it is first needed. @param {Run} run */
  row({ id, name }) {
    const existing = this.rows.get(id);
    if (existing) return existing;
    const box = el("input", {
      type: "checkbox",
      "aria-label": `Compare ${name}`,
      oninput: () => this.choose(id, box.checked),
    });
    const row = el(
      "tr",
      { "data-run": id },
      el("td", { class: "choose" }, box),
      el("th", { scope: "row" }, el("a", { href: `/runs/${id}` })),
    );
    for (const column of COLUMNS.slice(1)) row.append(el("td", { "data-label": column }));
    this.sparklines.observe(row);
    this.rows.set(id, row);
    return row;
  }

  /** @param {HTMLTableRowElement} row @param {Run} run */
  update(row, run) {
    const [, name, project, state, step, loss, rule, seen] = row.cells;
    /** @type {HTMLElement} */ (name.firstElementChild).textContent = run.name;
    project.textContent = run.project;
    fill(state, runState(run));
    step.textContent = count(run.last_step);
    if (!loss.firstChild) loss.append(this.sparklines.canvas(run.id), el("span", { class: "value" }));
    /** @type {HTMLElement} */ (loss.lastElementChild).textContent =
      "loss" in run.scalars ? measured(run.scalars.loss) : "–";
    const worst = run.worst_rule;
    fill(
      rule,
      worst ? el("span", { class: `chip ${run.worst_severity}` }, worst) : el("span", { class: "soft" }, "none"),
    );
    seen.textContent = ago(run.last_seen_at);
    seen.title = moment(run.last_seen_at);
    this.sparklines.update(run.id, run.last_step);
  }

  /** @param {string} id @param {boolean} on */
  choose(id, on) {
    if (on) this.chosen.add(id);
    else this.chosen.delete(id);
    this.updateChoice();
  }

  /** Check the boxes of the chosen runs; disable the others once there are enough to compare. */
  updateChoice() {
    this.compare.disabled = this.chosen.size < 2;
    for (const [id, row] of this.rows) {
      const box = /** @type {HTMLInputElement} */ (row.querySelector("input"));
      box.checked = this.chosen.has(id);
      box.disabled = this.chosen.size >= MOST_COMPARED && !box.checked;
    }
  }
}

/**
 * Make a menu of the values of a filter; the first entry, "", stands for all.
 * @param {string} label @param {string[]} values
 */
function filter(label, values) {
  /** @type {[string, string][]} */
  const options = values.map((value) => [value, shorten(value, LONGEST_OPTION)]);
  return select([["", `All ${label.toLowerCase()}s`], ...options], { "aria-label": label });
}

/** Make the instructions that are shown until a run has reported. */
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
