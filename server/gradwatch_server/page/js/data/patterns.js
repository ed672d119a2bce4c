// Patterns with `*`, `?` and `[...]`, by which silences choose alerts: the same as in the server, Python's fnmatch.

/** A token matches one character; a star any number of them. @typedef {"*" | ((character: string) => boolean)} Token */

/** Return the pattern that matches a text and nothing else. @param {string} text */
export const literalPattern = (text) => text.replace(/[*?[]/g, "[$&]");

/**
 * Return whether a pattern matches a text. It goes back to the last star alone, so that no pattern takes more than
 * (characters of the text) x (characters of the pattern) comparisons.
 * @param {string} pattern @param {string} text
 */
export function matches(pattern, text) {
  const [wanted, characters] = [tokens(Array.from(pattern)), Array.from(text)];
  let [next, at, star, retry] = [0, 0, -1, 0];
  while (at < characters.length) {
    const token = wanted[next];
    if (token === "*") [star, retry] = [next++, at];
    else if (token?.(characters[at])) [next, at] = [next + 1, at + 1];
    else if (star < 0) return false;
    else [next, at] = [star + 1, ++retry];
  }
  return wanted.slice(next).every((token) => token === "*");
}

/** @param {string[]} pattern @returns {Token[]} */
function tokens(pattern) {
  /** @type {Token[]} */
  const found = [];
  for (let at = 0; at < pattern.length; at++) {
    const character = pattern[at];
    const end = character === "[" ? setEnd(pattern, at) : -1;
    if (end > 0) {
      found.push(setToken(pattern.slice(at + 1, end)));
      at = end;
    } else if (character === "*") found.push("*");
    else if (character === "?") found.push(() => true);
    else found.push((given) => given === character);
  }
  return found;
}

/** Return the place of the bracket that ends a set, -1 if none does. @param {string[]} pattern @param {number} start */
function setEnd(pattern, start) {
  const first = pattern[start + 1] === "!" ? start + 2 : start + 1;
  return pattern.indexOf("]", first + 1);
}

/** Return the token of a set such as `a-z_` or `!0-9`. @param {string[]} set @returns {Token} */
function setToken(set) {
  const negated = set[0] === "!";
  const members = negated ? set.slice(1) : set;
  return (given) => isMember(members, given) !== negated;
}

/** @param {string[]} members @param {string} given */
function isMember(members, given) {
  const code = (/** @type {string} */ character) => Number(character.codePointAt(0));
  for (let at = 0; at < members.length; at++) {
    const isRange = members[at + 1] === "-" && at + 2 < members.length;
    const last = isRange ? members[at + 2] : members[at];
    if (code(members[at]) <= code(given) && code(given) <= code(last)) return true;
    if (isRange) at += 2;
  }
  return false;
}
