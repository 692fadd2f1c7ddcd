/* One distillation run: stages, progress, verdict with the table of arms, the loss; and the triggers of the next one. */

import { byId, h, replace } from "./dom.js";
import { ago, decimal, duration, integer, isNumber } from "./format.js";
import { badge } from "./cartridge_view.js";
import { StepChart } from "./chart.js";
import { sentence } from "./convergence.js";
import { armsPlot, armsTable, comparisons, gateWords } from "./evaluation_view.js";
import { OPEN, triggerItem } from "./triggers.js";

const STAGES = ["dataset", "initial prefix", "training", "gate"];
const STAGE_TEXT = { dataset: "Make questions", "initial prefix": "First values", training: "Train", gate: "Examine" };
const TABLE_ROWS = 50;

const chart = new StepChart(byId("run-chart"), {
  height: 240,
  sync: "run",
  series: [
    { label: "Training", token: "--chart-train", width: 1.25 },
    { label: "Held out", token: "--chart-holdout", width: 2.5, points: true },
    { label: "Before the first step", token: "--chart-baseline", width: 1.25, dash: [6, 4] },
  ],
  range: (_, low, high) => {
    if (!isNumber(low) || !isNumber(high)) return [0, 1];
    const space = Math.max(0.05, 0.06 * (high - low));
    return [Math.max(0, low - space), high + space];
  },
});

// -- where it stands ---------------------------------------------------------------------------------------------

/** Show `run` (or that there is none). */
export function renderRun(run, metrics) {
  byId("run-body").hidden = !run;
  byId("run-none").hidden = Boolean(run);
  byId("run-cancel").hidden = !run || !["queued", "running"].includes(run.state);
  replace(byId("run-state"), run?.state ?? null, () => (run ? badge(run.state) : null));
  if (!run) return;
  replace(byId("run-about"), [run.id, run.trigger, run.created_at], () => [`${run.id}, ${run.trigger === "manual" ? "started by hand" : `started by the trigger ${run.trigger}`}, `, ago(run.created_at)]);
  renderStages(run);
  renderProgress(run);
  renderVerdict(run);
  renderLoss(run, metrics);
}

function renderStages(run) {
  const { stage } = run.progress;
  const whole = ["promoted", "rejected"].includes(run.state);
  const place = STAGES.indexOf(stage);
  const items = STAGES.map((name, index) => ({ name, is: whole || index < place ? "done" : index === place ? (OPEN.includes(run.state) ? "current" : "ended") : "todo" }));
  const words = { done: "done", current: "now", ended: "ended here", todo: "to come" };
  replace(byId("run-stages"), items, () => items.map(({ name, is }) =>
    h("li", { dataset: { is }, "aria-current": is === "current" ? "step" : null }, h("span", { class: "stage-name" }, STAGE_TEXT[name]), h("span", { class: "stage-is" }, words[is]))));
}

function renderProgress(run) {
  const meter = byId("run-meter");
  const { fraction, detail, eta_s: eta, stage } = run.progress;
  const share = Math.round(100 * (fraction ?? 0));
  meter.hidden = !OPEN.includes(run.state);
  meter.setAttribute("aria-valuenow", String(share));
  meter.firstElementChild.style.width = `${share}%`;
  const rest = stage === "training" && isNumber(eta) ? `about ${duration(eta)} of training left` : "";
  const waiting = run.state === "queued" ? "Waiting for its turn: one run is worked on at a time" : "";
  const cancelling = run.state === "cancelling" ? "Ends at its next step" : "";
  byId("run-detail").textContent = OPEN.includes(run.state) ? [`${share} %`, waiting || cancelling || detail, rest].filter(Boolean).join(", ") : spent(run);
}

function spent(run) {
  const data = run.progress.data;
  return [
    isNumber(run.finished_at) ? `Took ${duration(run.finished_at - run.created_at)}.` : "",
    data ? `${integer(data.train_rows)} questions to learn from, ${integer(data.eval_rows)} held out.` : "",
    data?.redactions && Object.keys(data.redactions).length > 0 ? `Left out: ${Object.entries(data.redactions).map(([kind, count]) => `${integer(count)} × ${kind}`).join(", ")}.` : "",
  ].filter(Boolean).join(" ");
}

// -- the verdict -------------------------------------------------------------------------------------------------

const ENDINGS = {
  promoted: (run) => `${run.progress.cartridge} passed and was put into service.`,
  rejected: (run) => `${run.progress.cartridge} did not pass, so nothing changes.`,
  skipped: () => "There was too little to learn from.",
  failed: () => "It ended with an error.",
  cancelled: () => "It was cancelled.",
};

function renderVerdict(run) {
  const { verdict, evaluation, detail } = run.progress;
  const ended = !OPEN.includes(run.state);
  replace(byId("run-verdict"), [run.state, verdict, evaluation, run.error, ended ? detail : null], () => {
    if (!ended) return null;
    const tone = { promoted: "good", rejected: "warn", skipped: "warn", failed: "bad", cancelled: "" }[run.state];
    const why = run.error ?? (verdict ? "" : detail);
    return h("div", { class: "verdict stack" },
      h("div", { class: "notice", dataset: { tone } }, h("p", {}, h("strong", {}, ENDINGS[run.state]?.(run) ?? run.state)), why ? h("p", {}, sentence(why)) : null,
        verdict && verdict.comparisons.length === 0 ? h("p", {}, sentence(verdict.reason)) : null),
      evaluation?.arms ? [armsPlot(evaluation.arms), armsTable(evaluation.arms), h("p", { class: "hint" }, "Nats: how much a right answer surprises it; less is better. Attended: the tokens and slots that each written token looks at.")] : null,
      verdict?.comparisons?.length ? comparisons(verdict) : null);
  });
}

// -- the loss ----------------------------------------------------------------------------------------------------

function renderLoss(run, metrics) {
  const some = Boolean(metrics) && metrics.length > 0;
  const early = !some && OPEN.includes(run.state);
  byId("run-loss-title").hidden = !some && !early;
  byId("run-chart").hidden = !some;
  byId("run-twin").hidden = !some;
  byId("run-wait").textContent = early ? "Nothing measured yet. It begins with the training." : "";
  byId("run-summary").textContent = some ? lossWords(metrics) : "";
  byId("run-gate").textContent = OPEN.includes(run.state) ? gateWords(run.config.gate) : "";
  if (!some) return;
  const columns = metrics.columns();
  const first = metrics.heldOut()?.first.value ?? null;
  chart.setData([...columns, columns[0].map(() => first)]);
  if (byId("run-twin").open) renderTwin(columns);
}

function lossWords(metrics) {
  const found = metrics.heldOut();
  if (!found) return "Nats per token of the teacher's answers. Nothing was held out.";
  const { first, best } = found;
  const ended = metrics.ended ? ` Training ended: ${metrics.ended}.` : "";
  return `Nats per token of the answers. Best on what is held out: ${decimal(best.value)} at step ${integer(best.step)}, against ${decimal(first.value)} before the first step.${ended}`;
}

function renderTwin([steps, loss, heldOut]) {
  const cell = (value) => h("td", { class: "num" }, isNumber(value) ? decimal(value, 4) : h("span", { class: "missing" }, "not at this step"));
  const indices = steps.map((_, index) => index).slice(-TABLE_ROWS).reverse();
  byId("run-table").replaceChildren(
    h("thead", {}, h("tr", {}, ["Step", "Training", "Held out"].map((label) => h("th", { scope: "col", class: "num" }, label)))),
    h("tbody", {}, indices.map((index) => h("tr", {}, h("th", { scope: "row", class: "num" }, integer(steps[index])), cell(loss[index]), cell(heldOut[index])))));
}

// -- the triggers ------------------------------------------------------------------------------------------------

/** `outlook`: the domain's entry of the schedule, or null; `schedule`: all of it. */
export function renderTriggers(outlook, schedule) {
  byId("triggers-sentence").textContent = outlook ? whatNext(outlook, schedule) : "Nothing has been lived through in this domain.";
  replace(byId("triggers"), outlook?.triggers ?? null, () => (outlook?.triggers ?? []).map(triggerItem));
}

function whatNext(outlook, schedule) {
  if (!schedule.automatic) return "Runs are started by hand only (distillation.automatic is false). This is what the triggers see:";
  const when = isNumber(schedule.next_look) ? ` The triggers are looked at again in ${duration(Math.max(1, schedule.next_look - Date.now() / 1000))}.` : "";
  if (outlook.situation.open_run) return "A run is under way; the triggers wait for its end.";
  return `${sentence(outlook.would_start ? `${outlook.would_start} starts one: ${outlook.reason}` : outlook.reason)}${when}`;
}
