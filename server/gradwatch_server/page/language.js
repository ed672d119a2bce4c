// Runs before all other scripts: where the browser's language is none that Intl knows, English stands in for it.
//
// The charts' library formats numbers for navigator.language as soon as it is loaded. A language such as "C", which a
// browser takes over from its surroundings, is an error there, and no chart would be drawn.

try {
  new Intl.NumberFormat(navigator.language);
} catch {
  Object.defineProperty(navigator, "language", { value: "en-US" });
}
