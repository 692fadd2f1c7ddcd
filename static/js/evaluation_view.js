/* What the gate found: the arms as a plot and as a table, and each comparison beside what it allows. */

import { h } from "./dom.js";
import { decimal, integer, isNumber, measured, missing, percent } from "./format.js";
import { sentence } from "./convergence.js";
import { ceiling } from "./sparkline.js";
import { mark } from "./triggers.js";

const ARMS = { cartridge: "This cartridge", long_prompt: "The long prompt", memoryless: "No cartridge", serving: "What served then" };
const RIVALS = { long_prompt: "the long prompt", memoryless: "no cartridge", serving: "what served then" };
const SHARES = ["exact", "ranked"];

function interval(value, format) {
  return [h("span", { class: "value" }, format(value.mean)), value.low === value.high ? null : h("span", { class: "sub" }, `${format(value.low)} to ${format(value.high)}`)];
}

const COLUMNS = [
  { metric: "exact", label: "Right answers", format: percent, why: "no question had a known answer" },
  { metric: "ranked", label: "Ranked first", format: percent, why: "there were no candidates to rank" },
  { metric: "nll", label: "Nats of the right one", format: (value) => decimal(value, 2), why: "no question had a known answer" },
  { metric: "kl", label: "Nats from the long prompt", format: (value) => decimal(value, 3), why: "the teacher's distribution is not known" },
];

/** The arms in numbers. */
export function armsTable(arms) {
  const names = Object.keys(ARMS).filter((name) => arms[name]);
  const columns = COLUMNS.filter(({ metric }) => ["exact", "nll"].includes(metric) || names.some((name) => arms[name][metric]));
  const rows = arms[names[0]]?.exact?.rows ?? arms[names[0]]?.kl?.rows ?? null;
  return h("div", { class: "table-scroll", role: "group", "aria-label": "Results by arm, table", tabindex: 0 },
    h("table", { class: "data-table arms-table card-table" },
      h("caption", { class: "visually-hidden" }, "Asked with each prompt"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, isNumber(rows) ? `${integer(rows)} held-out questions` : "Asked with"), columns.map(({ label }) => h("th", { scope: "col", class: "num" }, label)), h("th", { scope: "col", class: "num" }, "Attended tokens"))),
      h("tbody", {}, names.map((name) => h("tr", { dataset: { arm: name } }, h("th", { scope: "row" }, ARMS[name]),
        columns.map(({ metric, label, format, why }) => h("td", { class: "num", "data-label": label }, arms[name][metric] ? interval(arms[name][metric], format) : missing(why, "not asked"))),
        h("td", { class: "num", "data-label": "Attended tokens" }, measured(arms[name].attended, (value) => decimal(value, 0)), arms[name].slots > 0 ? h("span", { class: "sub" }, `${integer(arms[name].slots)} slots`) : null))))));
}


// -- as a plot ---------------------------------------------------------------------------------------------------

function at(element, name, share) {
  element.style[name] = `${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%`;
  return element;
}

/** One line: the 95 % interval as a bar, the mean as a dot, the long prompt's mean as a dashed line. */
function track(value, top, reference) {
  const bar = at(h("span", { class: "plot-interval" }), "left", value.low / top);
  at(bar, "width", (value.high - value.low) / top);
  return h("span", { class: "plot-track" },
    reference === null ? null : at(h("span", { class: "plot-reference" }), "left", reference / top),
    bar, at(h("span", { class: "plot-dot" }), "left", value.mean / top));
}

function plotOf({ title, names, valueOf, top, format, note }) {
  const reference = names.includes("long_prompt") ? valueOf("long_prompt").mean : null;
  const words = names.map((name) => `${ARMS[name]} ${format(valueOf(name).mean)}`).join(", ");
  return h("figure", { class: "plot", role: "img", "aria-label": `${title}: ${words}.` },
    h("figcaption", {}, h("strong", {}, title), h("span", { class: "hint" }, ` ${note}`)),
    names.map((name) => h("div", { class: "plot-row", dataset: { arm: name } }, h("span", { class: "plot-name" }, ARMS[name]), track(valueOf(name), top, reference), h("span", { class: "plot-value" }, format(valueOf(name).mean)))),
    h("div", { class: "plot-row plot-axis" }, h("span", {}), h("span", { class: "plot-scale hint" }, h("span", {}, format(0)), h("span", {}, format(top))), h("span", {})));
}

/** Every measured quantity by arm, against the long prompt. */
export function armsPlot(arms) {
  const names = Object.keys(ARMS).filter((name) => arms[name]);
  const plots = COLUMNS.filter(({ metric }) => names.filter((name) => arms[name][metric]).length > 1).map(({ metric, label, format }) => {
    const own = names.filter((name) => arms[name][metric]);
    const top = SHARES.includes(metric) ? 1 : ceiling(Math.max(...own.map((name) => arms[name][metric].high)));
    return plotOf({ title: label, names: own, valueOf: (name) => arms[name][metric], top, format, note: SHARES.includes(metric) ? "more is better" : "less is better" });
  });
  const costs = names.filter((name) => isNumber(arms[name].attended));
  if (costs.length > 1) {
    const cost = (name) => ({ mean: arms[name].attended, low: 0, high: arms[name].attended });
    plots.push(plotOf({ title: "Attended tokens", names: costs, valueOf: cost, top: ceiling(Math.max(...costs.map((name) => arms[name].attended))), format: (value) => decimal(value, 0), note: "what each written token looks at; less is cheaper" }));
  }
  return h("div", { class: "plots" }, plots);
}

// -- how it decided ----------------------------------------------------------------------------------------------

const signed = (value, format) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${format(Math.abs(value))}`;

/** The difference to a rival with its 95 % interval, zero, and the line that it must not cross. */
function differencePlot(item, margin) {
  const shares = SHARES.includes(item.metric);
  const limit = shares ? -margin : item.rival === "memoryless" ? 0 : margin;
  const reach = 1.15 * Math.max(Math.abs(item.low), Math.abs(item.high), Math.abs(limit), 1e-9);
  const place = (value) => (value + reach) / (2 * reach);
  const bar = at(h("span", { class: "plot-interval" }), "left", place(item.low));
  at(bar, "width", (item.high - item.low) / (2 * reach));
  const allowed = at(h("span", { class: "plot-allowed" }), shares ? "left" : "right", shares ? place(limit) : 1 - place(limit));
  const format = shares ? (value) => `${decimal(100 * value, 1)} points` : (value) => `${decimal(value, 2)} nats`;
  const rule = shares ? `at least ${signed(limit, format)}` : limit === 0 ? "below 0" : `at most ${signed(limit, format)}`;
  return h("div", { class: "gate-plot" },
    h("span", { class: "plot-track", dataset: { passed: String(item.passed) }, "aria-hidden": "true" }, allowed, at(h("span", { class: "plot-zero" }), "left", place(0)), bar, at(h("span", { class: "plot-dot" }), "left", place(item.difference))),
    h("span", { class: "why" }, `The difference is ${signed(item.difference, format)}; with 95 % confidence it is ${shares ? "at least" : "at most"} ${signed(item.bound, format)}. Allowed is ${rule}: the shaded side.`));
}

export function comparisons(verdict) {
  const shown = (item, value) => (SHARES.includes(item.metric) ? percent(value) : `${decimal(value, 2)} nats`);
  return h("details", { class: "twin", open: true }, h("summary", {}, "How the gate decided"),
    h("p", { class: "hint gate-words" }, sentence(verdict.reason)),
    h("ul", { class: "conditions" }, verdict.comparisons.map((item) => h("li", {},
      mark(item.passed, item.passed ? "passed" : "not passed"),
      h("span", {}, `${SHARES.includes(item.metric) ? "Right answers" : "Cost"} against ${RIVALS[item.rival] ?? item.rival}`),
      h("span", { class: "condition-number" }, shown(item, item.candidate), h("span", { class: "hint" }, ` against ${shown(item, item.other)}`)),
      differencePlot(item, verdict.margin)))));
}

/** What the gate of a run will ask, before it has asked. `gate`: the run's configuration of it. */
export function gateWords(gate) {
  if (!gate) return "";
  const serving = gate.must_beat_serving ? " and what serves now" : "";
  const nats = `it must be nearer to the long prompt's answers than the model without it${gate.must_beat_serving ? `, and at most ${decimal(gate.margin, 2)} nats farther than what serves now` : ""}`;
  const shares = `it may give at most ${decimal(100 * gate.margin, 1)} points fewer right answers than the long prompt, no cartridge${serving}, and right answers must be likelier than without one`;
  const what = { kl: nats, auto: `where enough answers are known, ${shares}; otherwise ${nats}` }[gate.metric] ?? shares;
  return `The loss does not decide. The gate asks at least ${integer(gate.min_rows)} held-out questions: ${what}.`;
}
