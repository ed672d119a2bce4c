// Elements made from data. Text is only ever set as text: no name can become markup.

/** @typedef {Node | string | number | null | undefined | false} Child */
/** @typedef {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} Attributes */

/**
 * Make an element. Functions named `on...` become listeners, booleans switch an attribute on or off.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Attributes | null} [attributes]
 * @param {...(Child | Child[])} children false, null and undefined are left out
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...nodes(children.flat()));
  return element;
}

/** @param {Child[]} children @returns {(Node | string)[]} */
function nodes(children) {
  return children
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child)));
}

/** Replace the children of an element. @param {Element} parent @param {...(Child | Child[])} children */
export function fill(parent, ...children) {
  parent.replaceChildren(...nodes(children.flat()));
}

/** Make a button. @param {string | Node[]} text @param {() => void} onclick @param {Attributes} [attributes] */
export const button = (text, onclick, attributes = {}) =>
  el("button", { type: "button", onclick, ...attributes }, text);

/** Let a dotted name break behind its dots, and nowhere else. @param {string} name @returns {Node[]} */
export const breakable = (name) =>
  name.split(/(?<=\.)/).flatMap((part, index) => [...(index ? [el("wbr")] : []), document.createTextNode(part)]);

/** Make a menu. @param {[value: string, text: string][]} options @param {Attributes} [attributes] */
export const select = (options, attributes = {}) =>
  el(
    "select",
    attributes,
    options.map(([value, text]) => el("option", { value }, text)),
  );

/** Make the head of a table. @param {(string | Node)[]} titles of its columns */
export const tableHead = (titles) =>
  el(
    "thead",
    null,
    el(
      "tr",
      null,
      titles.map((title) => el("th", { scope: "col" }, title)),
    ),
  );

/** Make a region that scrolls sideways, by keyboard too. @param {string} label @param {...Child} children */
export const scrollable = (label, ...children) =>
  el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);

/**
 * Make a list of terms and their descriptions.
 * @param {string} name class of the list @param {(readonly [term: string, description: Child])[]} pairs
 * @param {string} [kind] class of the descriptions
 */
export const descriptions = (name, pairs, kind) =>
  el(
    "dl",
    { class: name },
    pairs.flatMap(([term, description]) => [el("dt", null, term), el("dd", { class: kind }, description)]),
  );
