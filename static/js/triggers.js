/* The triggers of distillation as a list, and what they share with the runs that they start. */

import { h, s } from "./dom.js";
import { decimal, duration, integer, isNumber } from "./format.js";
import { sentence } from "./convergence.js";

/** States of a run that has not ended. */
export const OPEN = ["queued", "running", "cancelling"];
const MARKS = { true: "M2 7.5l3.5 3.5L12 3.5", false: "M3 3l8 8M11 3l-8 8", null: "M3 7h8" };

/** A sign with its word: met, not met, or neither. */
export function mark(value, word) {
  return s("svg", { class: "condition-mark", viewBox: "0 0 14 14", role: "img", "aria-label": word, "data-met": String(value) }, s("path", { d: MARKS[String(value)] }));
}

const TRIGGERS = {
  stale: { name: "What it learned was deleted", format: () => "" },
  tokens: { name: "Tokens since the last run", format: integer, of: integer },
  episodes: { name: "Episodes since the last run", format: integer, of: integer },
  elapsed: { name: "Time since the last run", format: duration, of: duration },
  plateau: { name: "Scores no longer improve", format: (value) => decimal(value, 2), of: (value) => `gain below ${decimal(value, 2)}` },
};

/** A line of a list of triggers: what it counts, how far it is, why it fires or waits. */
export function triggerItem({ name, fires, value, threshold, reason }) {
  const known = TRIGGERS[name] ?? { name, format: decimal, of: decimal };
  const off = threshold === null;
  const number = off || !isNumber(value) ? "" : known.format(value);
  return h("li", {},
    mark(fires ? true : null, fires ? "fires" : off ? "switched off" : "waits"),
    h("span", {}, known.name),
    h("span", { class: "condition-number" }, number, off || !known.of || number === "" ? null : h("span", { class: "hint" }, name === "plateau" ? ` ${known.of(threshold)}` : ` of ${known.of(threshold)}`)),
    h("span", { class: "why" }, sentence(reason)));
}
