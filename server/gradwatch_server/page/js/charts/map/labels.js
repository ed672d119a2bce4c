// Names beside the map: grouped by module, as deep as there is room for.

/** @typedef {{first: number, past: number, text: string, deep: number}} Group rows of one module */

const LINE = 12;

/**
 * Groups that each have room for a line of text.
 * @param {string[]} names in the order of depth @param {number} rowHeight
 * @returns {Group[]}
 */
export function groups(names, rowHeight) {
  return split(names, 0, names.length, 0, rowHeight);
}

/** @param {string[]} names @param {number} first @param {number} past @param {number} deep @param {number} rowHeight @returns {Group[]} */
function split(names, first, past, deep, rowHeight) {
  const parts = runsOf(names, first, past, deep + 1);
  const room = parts.every((part) => (part.past - part.first) * rowHeight >= LINE);
  if (!room && deep > 0) return [{ first, past, text: prefix(names[first], deep), deep }];
  return parts.flatMap((part) => {
    const whole = part.past - part.first === 1 || names[part.first].split(".").length <= deep + 1;
    return whole ? [part] : split(names, part.first, part.past, deep + 1, rowHeight);
  });
}

/** Neighbours that share a prefix. @param {string[]} names @param {number} first @param {number} past @param {number} deep */
function runsOf(names, first, past, deep) {
  /** @type {Group[]} */
  const found = [];
  for (let row = first; row < past; row++) {
    const text = prefix(names[row], deep);
    const open = found.at(-1);
    if (open && open.text === text) open.past = row + 1;
    else found.push({ first: row, past: row + 1, text, deep });
  }
  return found.map((group) => (group.past - group.first === 1 ? { ...group, text: names[group.first] } : group));
}

/** @param {string} name @param {number} deep */
const prefix = (name, deep) => name.split(".").slice(0, deep).join(".");

/** Neighbours of one module, where there are several. @param {string[]} names @returns {{first: number, past: number}[]} */
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
 * @param {{left: number, chosen: number}} place @param {{soft: string, ink: string, font: string}} theme
 */
export function drawLabels(context, names, top, rowHeight, place, theme) {
  context.font = theme.font;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.strokeStyle = `color-mix(in srgb, ${theme.soft} 60%, transparent)`;
  const all = groups(names, rowHeight);
  const brackets = rowHeight >= LINE ? modules(names) : all.filter(({ first, past }) => past - first > 1);
  for (const { first, past } of brackets) bracket(context, place.left - 5, top + first * rowHeight, top + past * rowHeight);
  let free = -Infinity;
  for (const group of all) {
    const y = top + ((group.first + group.past) / 2) * rowHeight;
    if (y - free < LINE) continue;
    const chosen = place.chosen >= group.first && place.chosen < group.past;
    context.fillStyle = chosen ? theme.ink : theme.soft;
    context.fillText(shortened(context, group.text, place.left - 12), place.left - 9, y);
    free = y;
  }
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} top @param {number} bottom */
function bracket(context, x, top, bottom) {
  context.beginPath();
  context.moveTo(x + 2.5, top + 1.5);
  context.lineTo(x + 0.5, top + 1.5);
  context.lineTo(x + 0.5, bottom - 1.5);
  context.lineTo(x + 2.5, bottom - 1.5);
  context.stroke();
}

/** The end of a name says most: cut it at the front. @param {CanvasRenderingContext2D} context @param {string} text @param {number} room */
export function shortened(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let cut = text;
  while (cut.length > 1 && context.measureText(`…${cut}`).width > room) cut = cut.slice(1);
  return `…${cut.replace(/^\./, "")}`;
}
