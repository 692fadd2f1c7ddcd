/* The conditions of convergence, each with its number, and the sentence that sums a kernel up. */

import { h, s } from "./dom.js";
import { decimal, integer, isNumber, measured } from "./format.js";

const WINDOW = 100;

/** The conditions as {name, met (true, false or null = cannot be said yet), number, why}. */
export function conditionsOf(kernel) {
  const c = kernel.convergence ?? {};
  const threshold = c.phi_threshold ?? 0.7;
  const spread = c.std_threshold ?? 0.05;
  const filled = c.steps_in_window ?? 0;
  const waiting = filled < WINDOW ? `${integer(filled)} of the last ${WINDOW} values measured` : "";
  const { holdout, baseline_context_free: baseline, gate } = kernel.loss;
  const both = isNumber(holdout) && isNumber(baseline);
  return [
    { name: `Φ above ${threshold}`, met: waiting ? null : c.phi_ok, value: c.phi_mean ?? null, why: ["mean of the last 100", waiting].filter(Boolean).join("; ") },
    { name: `Φ steady, spread below ${spread}`, met: waiting ? null : c.stable_ok, value: waiting ? null : c.phi_std, why: ["standard deviation of the last 100", waiting].filter(Boolean).join("; ") },
    { name: "Predicts better than the baseline", met: both ? c.loss_ok ?? null : null, value: both ? holdout - baseline : null,
      why: both ? `held-out ${decimal(holdout)}, baseline ${decimal(baseline)} nats per byte; ${gate}` : gate },
  ];
}

const MARKS = { true: "M2 7.5l3.5 3.5L12 3.5", false: "M3 3l8 8M11 3l-8 8", null: "M3 7h8" };
const WORDS = { true: "met", false: "not met", null: "cannot be said yet" };

export function conditionItem({ name, met, value, why }, reason) {
  return h("li", {},
    s("svg", { class: "condition-mark", viewBox: "0 0 14 14", role: "img", "aria-label": WORDS[String(met)], "data-met": String(met) }, s("path", { d: MARKS[String(met)] })),
    h("span", {}, name), measured(value, signed(name), reason), h("span", { class: "why" }, why));
}

function signed(name) {
  return name.startsWith("Predicts") ? (value) => `${value > 0 ? "+" : "−"}${decimal(Math.abs(value))}` : decimal;
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
