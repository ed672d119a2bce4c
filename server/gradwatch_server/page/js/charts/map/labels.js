// Names of parameters beside the map, grouped by module where rows are too low for a line of text.

/** @typedef {{first: number, past: number, text: string, depth: number}} Group rows of one module, `past` exclusive */

const LINE_PIXELS = 12;

/**
 * Return groups of rows that are high enough for a line of text.
 * @param {string[]} names in the order of depth @param {number} rowHeight
 * @returns {Group[]}
 */
export function groups(names, rowHeight) {
  return split(names, 0, names.length, 0, rowHeight);
}

/**
 * @param {string[]} names @param {number} first @param {number} past @param {number} depth @param {number} rowHeight
 * @returns {Group[]}
 */
function split(names, first, past, depth, rowHeight) {
  const parts = groupByPrefix(names, first, past, depth + 1);
  const legible = parts.every((part) => (part.past - part.first) * rowHeight >= LINE_PIXELS);
  if (!legible && depth > 0) return [{ first, past, text: prefix(names[first], depth), depth }];
  return parts.flatMap((part) => {
    const whole = part.past - part.first === 1 || names[part.first].split(".").length <= depth + 1;
    return whole ? [part] : split(names, part.first, part.past, depth + 1, rowHeight);
  });
}

/**
 * Group neighbours that share a prefix.
 * @param {string[]} names @param {number} first @param {number} past @param {number} depth
 */
function groupByPrefix(names, first, past, depth) {
  /** @type {Group[]} */
  const found = [];
  for (let row = first; row < past; row++) {
    const text = prefix(names[row], depth);
    const open = found.at(-1);
    if (open && open.text === text) open.past = row + 1;
    else found.push({ first: row, past: row + 1, text, depth });
  }
  return found.map((group) => (group.past - group.first === 1 ? { ...group, text: names[group.first] } : group));
}

/** Return the first parts of a dotted name. @param {string} name @param {number} depth number of parts */
const prefix = (name, depth) => name.split(".").slice(0, depth).join(".");

/**
 * Return the rows of each module with several neighbouring parameters.
 * @param {string[]} names @returns {{first: number, past: number}[]}
 */
export function modules(names) {
  const owners = names.map((name) => name.split(".").slice(0, -1).join("."));
  return owners.flatMap((owner, first) => {
    if (!owner || owners[first - 1] === owner) return [];
    let past = first + 1;
    while (owners[past] === owner) past++;
    return past > first + 1 ? [{ first, past }] : [];
  });
}

/**
 * @param {CanvasRenderingContext2D} context @param {string[]} names @param {number} top @param {number} rowHeight
 * @param {{left: number, chosen: number}} place left edge of the cells; the chosen row, or -1
 * @param {{soft: string, ink: string, font: string}} theme
 */
export function drawLabels(context, names, top, rowHeight, place, theme) {
  context.font = theme.font;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.strokeStyle = `color-mix(in srgb, ${theme.soft} 60%, transparent)`;
  const all = groups(names, rowHeight);
  const brackets = rowHeight >= LINE_PIXELS ? modules(names) : all.filter(({ first, past }) => past - first > 1);
  for (const { first, past } of brackets)
    drawBracket(context, place.left - 5, top + first * rowHeight, top + past * rowHeight);
  let previous = -Infinity;
  for (const { first, past, text } of all) {
    const y = top + ((first + past) / 2) * rowHeight;
    if (y - previous < LINE_PIXELS) continue;
    const chosen = place.chosen >= first && place.chosen < past;
    context.fillStyle = chosen ? theme.ink : theme.soft;
    context.fillText(shorten(context, text, place.left - 12), place.left - 9, y);
    previous = y;
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} top @param {number} bottom */
function drawBracket(context, x, top, bottom) {
  context.beginPath();
  context.moveTo(x + 2.5, top + 1.5);
  context.lineTo(x + 0.5, top + 1.5);
  context.lineTo(x + 0.5, bottom - 1.5);
  context.lineTo(x + 2.5, bottom - 1.5);
  context.stroke();
}

/**
 * Cut a name at its front, since its end says most.
 * @param {CanvasRenderingContext2D} context @param {string} text @param {number} width
 */
function shorten(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let cut = text;
  while (cut.length > 1 && context.measureText(`…${cut}`).width > width) cut = cut.slice(1);
  return `…${cut.replace(/^\./, "")}`;
}
