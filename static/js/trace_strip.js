/* One bar per token: how uncertain the model was (entropy, nats), and what the controller did there.

   The strip is one stop of the keyboard: the arrow keys walk through the tokens, and the line below says the numbers
   of the chosen one. The table under it holds all of them. */

import { h, s } from "./dom.js";
import { decimal, integer } from "./format.js";

const BAR = 7; // px per token
const HEIGHT = 56;
const LANE = 14; // for the marks of the decisions
const LOWEST_TOP = 3; // nats; a strip of a very sure answer should look sure
const MOST_ROWS = 400;

/* Each decision has its own shape; 10 x 10, centred. */
const DECISIONS = {
  broadcast: { word: "broadcast: the slots became virtual tokens", mark: "M5 1a4 4 0 1 0 .01 0z" },
  retrieve: { word: "retrieval: the memory was asked", mark: "M5 0l4.5 5L5 10 .5 5z" },
  write: { word: "write: the slots took in what was seen", mark: "M1.2 1.2h7.6v7.6H1.2z" },
  halt: { word: "halt: it ended the answer", mark: "M5 .5l4.6 8.5H.4z" },
};

const actsOf = (entry) => Object.keys(DECISIONS).filter((name) => entry[name]);

/** `trace`: `olympus.trace` of an answer, in order. Returns an element. */
export function traceStrip(trace) {
  const top = Math.max(LOWEST_TOP, ...trace.map((entry) => entry.entropy));
  const width = BAR * trace.length;
  const marker = s("rect", { class: "strip-chosen", y: 0, width: BAR, height: HEIGHT + LANE });
  const picture = s("svg", { width, height: HEIGHT + LANE, viewBox: `0 0 ${width} ${HEIGHT + LANE}`, "aria-hidden": "true" },
    marker, s("path", { class: "strip-bars", d: bars(trace, top) }), ...trace.flatMap(marks));
  const told = h("p", { class: "strip-told hint", "aria-live": "polite" });
  const strip = h("div", { class: "strip", tabindex: 0, role: "slider", "aria-label": "Tokens of the answer", "aria-valuemin": 1, "aria-valuemax": trace.length }, picture);
  const choose = (index, scroll) => {
    marker.setAttribute("x", BAR * index);
    strip.setAttribute("aria-valuenow", index + 1);
    strip.setAttribute("aria-valuetext", describe(trace[index]));
    told.replaceChildren(...line(trace[index], index));
    if (scroll) strip.scrollLeft = BAR * index - strip.clientWidth / 2;
  };
  let chosen = trace.reduce((best, entry, index) => (entry.entropy > trace[best].entropy ? index : best), 0);
  const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
  strip.addEventListener("keydown", (event) => {
    if (!(event.key in step)) return;
    event.preventDefault();
    chosen = Math.min(trace.length - 1, Math.max(0, chosen + step[event.key]));
    choose(chosen, true);
  });
  strip.addEventListener("pointermove", (event) => {
    chosen = Math.min(trace.length - 1, Math.max(0, Math.floor((event.clientX - picture.getBoundingClientRect().left) / BAR)));
    choose(chosen, false);
  });
  choose(chosen, false);
  return h("figure", { class: "trace" }, h("figcaption", {}, "Uncertainty, token by token", h("span", { class: "hint" }, ` entropy up to ${decimal(top, 1)} nats`)),
    strip, legend(trace), told, table(trace));
}

function bars(trace, top) {
  return trace.map((entry, index) => {
    const height = Math.max(1, (HEIGHT - 2) * entry.entropy / top);
    return `M${BAR * index + 1} ${HEIGHT}v${-height.toFixed(1)}h${BAR - 2}v${height.toFixed(1)}z`;
  }).join("");
}

/** The marks of what was done at a token, below its bar; when several happened, the last one of the list is drawn. */
function marks(entry, index) {
  const act = actsOf(entry).at(-1);
  return act ? [s("path", { class: "strip-mark", "data-act": act, d: DECISIONS[act].mark, transform: `translate(${BAR * index + BAR / 2 - 5} ${HEIGHT + 3})` })] : [];
}

function legend(trace) {
  const used = Object.keys(DECISIONS).filter((name) => trace.some((entry) => entry[name]));
  if (used.length === 0) return h("p", { class: "hint" }, "The controller did nothing while it was written.");
  return h("ul", { class: "strip-legend" }, used.map((name) => h("li", {},
    s("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, s("path", { class: "strip-mark", "data-act": name, d: DECISIONS[name].mark })),
    `${DECISIONS[name].word}, ${times(trace.filter((entry) => entry[name]).length)}`)));
}

function times(count) {
  return count === 1 ? "once" : `${integer(count)} times`;
}

function shown(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || " ";
}

function describe(entry) {
  return [shown(entry.text), `entropy ${decimal(entry.entropy, 2)}`, ...actsOf(entry)].join(", ");
}

function line(entry, index) {
  const numbers = [`entropy ${decimal(entry.entropy, 2)}`, `surprise ${decimal(entry.surprise, 2)}`, `best token ${decimal(100 * entry.top1, 0)} %`, `${integer(entry.virtual_tokens)} virtual tokens`];
  return [h("span", {}, `${integer(index + 1)}. `), h("code", {}, shown(entry.text)), ` ${numbers.join(", ")}`, ...actsOf(entry).map((name) => h("strong", {}, `; ${name}`))];
}

function table(trace) {
  const head = ["Token", "Entropy", "Surprise", "Decisions"];
  const rows = trace.slice(0, MOST_ROWS);
  const details = h("details", { class: "twin" }, h("summary", {}, "The same as a table"));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    details.append(h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Tokens, table" }, h("table", { class: "data-table" },
      h("thead", {}, h("tr", {}, head.map((label, index) => h("th", { scope: "col", class: index === 1 || index === 2 ? "num" : null }, label)))),
      h("tbody", {}, rows.map((entry) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, shown(entry.text))),
        h("td", { class: "num" }, decimal(entry.entropy, 3)), h("td", { class: "num" }, decimal(entry.surprise, 3)), h("td", {}, actsOf(entry).join(", ") || "–")))))),
      rows.length < trace.length ? h("p", { class: "hint" }, `The first ${integer(rows.length)} of ${integer(trace.length)} tokens.`) : "");
  });
  return details;
}
