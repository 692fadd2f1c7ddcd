/* The conditions of convergence, each with its number, and the sentence that sums a kernel up. */

import { h, s } from "./dom.js";
import { decimal, integer, isNumber, measured } from "./format.js";

/* What the server calls a condition, what people do, and how its number and threshold are written. */
const NAMES = {
  window: { name: "Φ measured often enough", format: integer, asks: (threshold) => `of ${integer(threshold)}` },
  phi: { name: "Φ high: mean of the last 100", format: decimal, asks: (threshold) => `above ${threshold}` },
  stable: { name: "Φ steady: their deviation", format: decimal, asks: (threshold) => `below ${threshold}` },
  learned: { name: "Predicts better than the baseline", format: decimal, asks: (threshold) => `below ${decimal(threshold)}` },
  plateau: { name: "No longer improving", format: integer, asks: (threshold) => `at least ${integer(threshold)}` },
};

/** The conditions as {name, met (true, false or null = cannot be said yet), value, format, asks, why}. */
export function conditionsOf(kernel) {
  return (kernel.convergence?.conditions ?? []).map(({ name, ok, value, threshold, reason }) => {
    const known = NAMES[name] ?? { name, format: decimal, asks: (limit) => `threshold ${limit}` };
    return {
      name: known.name, met: ok, value, format: known.format,
      asks: isNumber(threshold) ? known.asks(threshold) : "", why: sentence(reason),
    };
  });
}

/** A reason of the server as a sentence for people. */
export function sentence(reason) {
  const text = reason.replaceAll("Phi", "Φ");
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
}

const MARKS = { true: "M2 7.5l3.5 3.5L12 3.5", false: "M3 3l8 8M11 3l-8 8", null: "M3 7h8" };
const WORDS = { true: "met", false: "not met", null: "cannot be said yet" };

export function conditionItem({ name, met, value, format, asks, why }) {
  return h("li", {},
    s("svg", { class: "condition-mark", viewBox: "0 0 14 14", role: "img", "aria-label": WORDS[String(met)], "data-met": String(met) }, s("path", { d: MARKS[String(met)] })),
    h("span", {}, name),
    h("span", { class: "condition-number" }, measured(value, format, why), asks === "" ? null : h("span", { class: "hint" }, ` ${asks}`)),
    h("span", { class: "why" }, why));
}

const DOING = {
  queued: "waiting for its turn to train",
  waiting: "waiting for experience",
  training: "learning",
  paused: "paused",
  converged: "converged",
  settled: "settled: it has stopped improving without meeting every condition",
  stalled: "stalled: no step for longer than expected",
  failed: "stopped by an error",
  stopped: "stopped",
};

/** One plain sentence or two about where a kernel stands. */
export function sentenceOf(kernel) {
  const { holdout, baseline_context_free: baseline } = kernel.loss;
  const doing = DOING[kernel.state] ?? kernel.state;
  const head = `${doing.charAt(0).toUpperCase()}${doing.slice(1)}, ${kernel.step === 1 ? "one step" : `${integer(kernel.step)} steps`} so far.`;
  if (!isNumber(holdout) || !isNumber(baseline)) return `${head} ${kernel.state_reason || ""}`.trim();
  const gap = baseline - holdout;
  const against = Math.abs(gap) < 0.005 ? "as good as the context-free baseline" : `${decimal(Math.abs(gap), 2)} nats ${gap > 0 ? "better" : "worse"} than the context-free baseline`;
  return `${head} On examples it has never seen it is ${against}.`;
}
