/* Two answers to the same prompt side by side: with what the reader switched on, and without; and what it cost. */

import { h } from "./dom.js";
import { duration, integer, isNumber, missing } from "./format.js";
import { insideView } from "./inside_view.js";
import { speedOf, Turn } from "./turns.js";

/** Behaves as a turn of the conversation; what it says is its first side. */
export class PairTurn {
  constructor(what) {
    this.role = "assistant";
    this.sides = [
      new Turn("assistant", "", { who: `With ${what}`, label: `Answer with ${what}` }),
      new Turn("assistant", "", { who: "Without", label: "Answer without" }),
    ];
    this.results = [null, null];
    this.numbers = h("div", { class: "pair-numbers" });
    this.element = h("section", { class: "pair", "aria-label": `The same prompt with ${what} and without` },
      h("div", { class: "pair-sides" }, this.sides.map((side) => side.element)), this.numbers);
  }

  get text() {
    return this.sides[0].text;
  }

  offerAgain(onclick) {
    this.sides[0].offerAgain(onclick);
  }

  /** What the workspace did in the first answer, below both. */
  showInside(report, trace) {
    this.element.append(insideView(report, trace));
  }

  /** Note what one side measured; both together make the table. */
  measured(side, result) {
    this.results[side] = result;
    if (this.results.every(Boolean)) this.numbers.replaceChildren(comparison(...this.results));
  }
}

const ROWS = [
  ["Prompt tokens", (result) => result.promptTokens, integer],
  ["Slots of cartridges", (result) => result.cartridgeSlots, integer],
  ["Virtual tokens, all layers", (result) => result.workspace?.virtual_tokens ?? 0, integer],
  ["First token after", (result) => result.firstTokenSeconds, duration],
  ["Tokens per second", speedOf, (value) => value.toFixed(1)],
  ["Tokens written", (result) => result.tokens, integer],
];

function comparison(first, second) {
  const cell = (value, format) => h("td", { class: "num" }, isNumber(value) ? format(value) : missing("the answer was too short to measure it"));
  return h("div", {},
    h("p", { class: "pair-sentence" }, saved(first, second), sameText(first, second)),
    h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "What each answer cost, table" }, h("table", { class: "data-table pair-table" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Measured"), h("th", { scope: "col", class: "num" }, "With"), h("th", { scope: "col", class: "num" }, "Without"))),
      h("tbody", {}, ROWS.filter(([, valueOf]) => [first, second].some((result) => valueOf(result) !== 0)).map(([name, valueOf, format]) =>
        h("tr", {}, h("th", { scope: "row" }, name), cell(valueOf(first), format), cell(valueOf(second), format)))))),
    h("p", { class: "hint" }, "Written one after the other, so that neither slows the other down. Only the first answer is in the history and goes on in this conversation."));
}

function saved(first, second) {
  const difference = second.promptTokens - first.promptTokens;
  if (difference > 0) return `${integer(difference)} prompt tokens saved. `;
  if (difference < 0) return `${integer(-difference)} prompt tokens more: what was remembered stands in the prompt. `;
  return "No prompt token saved: both were asked with the same prompt. ";
}

function sameText(first, second) {
  return first.text === second.text ? "Both answers are the same." : "";
}
