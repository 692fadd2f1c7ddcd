/* One kernel: live charts, convergence, numbers, checkpoints, actions. */

import { announce, byId, h, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { decimal, duration, integer, isNumber, measured, percent } from "./format.js";
import { drawGuides, StepChart } from "./chart.js";
import { conditionItem, conditionsOf, sentence, sentenceOf } from "./convergence.js";
import { Checkpoints } from "./kernel_checkpoints.js";
import { wireForms } from "./kernel_forms.js";
import { domainText, stateBadge, stateText } from "./kernel_view.js";
import { Metrics } from "./metrics.js";
import { keepFresh, live, throttle } from "./shell.js";

const id = byId("kernel").dataset.kernelId;
const path = `/olympus/kernels/${encodeURIComponent(id)}`;
const metrics = new Metrics(`${path}/metrics`);
const TABLE_ROWS = 50;
const WIDE_SPAN = 20; // on a linear scale, what is below 1/20 of the top looks like zero
const checkpoints = new Checkpoints(path, () => refresh());
let kernel = null;
let gone = false; // deleted: whatever is asked now would be answered with 404

// -- charts ------------------------------------------------------------------------------------------------------

const LOSS = [
  { column: "holdout_loss", label: "Held-out", token: "--chart-holdout", width: 2.5 },
  { column: "loss", label: "Training", token: "--chart-train", width: 1.25 },
  { column: "baseline_loss", label: "Baseline", token: "--chart-baseline", width: 1.5, dash: [6, 5] },
];
const DRIFT = [{ column: "basin_drift", label: "Drift", token: "--olive", width: 2 }];
const PACE = [{ column: "step_ms", label: "Milliseconds", token: "--chart-train", width: 1.5 }];
const PHI = [{ column: "phi", label: "Φ", token: "--chart-phi", width: 2 }];

const lossChart = new StepChart(byId("loss-chart"), { series: LOSS, height: 300, sync: "steps", range: lossRange });
const phiChart = new StepChart(byId("phi-chart"), { series: PHI, height: 220, sync: "steps", range: () => [0, 1], draw: drawPhi });
const driftChart = new StepChart(byId("drift-chart"), { series: DRIFT, height: 150, sync: "steps", range: fromZero });
const paceChart = new StepChart(byId("step-chart"), { series: PACE, height: 150, sync: "steps", range: fromZero });

function fromZero(_, low, high) {
  return [0, isNumber(high) && high > 0 ? 1.1 * high : 1];
}

function lossRange(_, low, high) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  const space = Math.max(0.05, 0.06 * (high - low));
  return [Math.max(0, low - space), high + space];
}

function drawPhi(plot) {
  const c = kernel?.convergence ?? {};
  drawGuides(plot, { value: c.phi_threshold ?? 0.7, band: phiBand(c) });
}

/** mean ± std of the last 100 measured values, over the steps they were measured at. */
function phiBand(c) {
  if (!isNumber(c.phi_mean100) || !isNumber(c.phi_std100) || c.steps_in_window < 100) return null;
  const { step, phi } = metrics.columns;
  const measuredSteps = step.filter((_, index) => phi[index] !== null);
  if (measuredSteps.length < 2) return null;
  const first = measuredSteps.at(-Math.min(100, measuredSteps.length));
  return { from: first, to: measuredSteps.at(-1), low: c.phi_mean100 - c.phi_std100, high: c.phi_mean100 + c.phi_std100 };
}

let scaleChosen = false; // by the reader; until then the span of the values decides

function setLossScale(logarithmic) {
  byId("loss-scale").setAttribute("aria-pressed", String(logarithmic));
  lossChart.setLogarithmic(logarithmic);
}

function fitLossScale() {
  if (scaleChosen) return;
  const values = LOSS.flatMap(({ column }) => metrics.columns[column]).filter((value) => value > 0);
  const wide = values.length > 0 && values.reduce((a, b) => Math.max(a, b)) > WIDE_SPAN * values.reduce((a, b) => Math.min(a, b));
  if (wide !== (byId("loss-scale").getAttribute("aria-pressed") === "true")) setLossScale(wide);
}

function renderCharts() {
  const { columns } = metrics;
  fitLossScale();
  drawOrWait(lossChart, byId("loss-chart"), LOSS, "No step yet. Training begins when it has enough experiences.");
  drawOrWait(phiChart, byId("phi-chart"), PHI, kernel?.phi.reason ? `Not measured yet: ${kernel.phi.reason}.` : "Not measured yet.");
  const holdout = metrics.last("holdout_loss");
  const baseline = metrics.last("baseline_loss");
  byId("loss-summary").textContent = metrics.length === 0 ? "" : [
    `Nats per byte of the answer, over ${integer(columns.step.at(-1))} steps.`,
    isNumber(holdout) ? `Held-out ${decimal(holdout)}` : "Held-out loss not measured yet",
    isNumber(baseline) ? `against ${decimal(baseline)} for a baseline that ignores the question.` : "",
  ].join(" ");
  const phi = metrics.last("phi");
  byId("phi-summary").textContent = isNumber(phi) ? `Now ${decimal(phi)}. The band is the mean and standard deviation of the last 100 values, once there are 100.` : "";
  drawOrWait(driftChart, byId("drift-chart"), DRIFT, "Not measured yet.");
  drawOrWait(paceChart, byId("step-chart"), PACE, "No step yet.");
  const [drift, pace] = [metrics.last("basin_drift"), metrics.last("step_ms")];
  byId("pace-summary").textContent = [
    isNumber(drift) ? `Its mean basin lies ${decimal(drift)} from that of its best weights (Fisher-Rao, at most 3.142).` : "",
    isNumber(pace) ? `A step takes ${duration(pace / 1000)}.` : "",
  ].join(" ");
  renderTwin("pace-table", [...DRIFT, ...PACE]);
  renderTwin("loss-table", LOSS);
  renderTwin("phi-table", [...PHI, { column: "kappa", label: "κ" }]);
}

function drawOrWait(chart, box, series, text) {
  const some = series.some(({ column }) => metrics.columns[column].some((value) => value !== null));
  if (some) chart.setData([metrics.columns.step, ...series.map(({ column }) => metrics.columns[column])]);
  else replace(box, text, () => h("p", { class: "chart-wait" }, text));
}

/** The table beside a chart, filled only while it is open: the newest rows first. */
function renderTwin(tableId, series) {
  const table = byId(tableId);
  if (!table.closest("details").open) return;
  const { step } = metrics.columns;
  const indices = step.map((_, index) => index).filter((index) => series.some(({ column }) => metrics.columns[column][index] !== null)).slice(-TABLE_ROWS).reverse();
  const cell = (value) => h("td", { class: "num" }, isNumber(value) ? decimal(value, 4) : h("span", { class: "missing" }, "not at this step"));
  table.replaceChildren(
    h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "Step"), series.map(({ label }) => h("th", { scope: "col", class: "num" }, label)))),
    h("tbody", {}, indices.map((index) => h("tr", {}, h("th", { scope: "row", class: "num" }, integer(step[index])), series.map(({ column }) => cell(metrics.columns[column][index]))))));
}

// -- state and numbers -------------------------------------------------------------------------------------------

function renderHead() {
  byId("kernel-title").textContent = kernel.god_name;
  document.title = `${kernel.god_name} · Olympus`;
  byId("kernel-domain").textContent = domainText(kernel.domain);
  replace(byId("kernel-state"), stateText(kernel), () => stateBadge(kernel.state, stateText(kernel)));
  byId("kernel-sentence").textContent = sentenceOf(kernel);
  const error = byId("kernel-error");
  error.hidden = !kernel.error;
  error.textContent = kernel.error ?? "";
  renderActions();
}

function renderConvergence() {
  const convergence = kernel.convergence ?? { converged: false, reason: "nothing has been measured yet" };
  replace(byId("conditions"), conditionsOf(kernel), () => conditionsOf(kernel).map(conditionItem));
  replace(byId("conv-verdict"), convergence.converged, () => stateBadge(convergence.converged ? "converged" : "queued", convergence.converged ? "converged" : "not yet"));
  byId("conv-reason").textContent = convergence.converged || conditionsOf(kernel).length === 0 ? sentence(convergence.reason) : "";
}

function numberRows() {
  const { loss, phi, basin, buffer, optimizer, throughput, cost, plasticity, prequential, drift } = kernel;
  const idle = kernel.state === "training" ? "no step yet" : "it is not training";
  const noBuffer = "the buffer is filled when it trains";
  const noNews = "new experiences are put to it before it learns from them; none came yet";
  return [
    ["Regime", phi.value === null ? null : kernel.regime, phi.reason],
    ["Φ now", phi.value, phi.reason, decimal],
    ["κ, coupling", kernel.kappa, phi.reason, decimal],
    ["Basin drift", basin.drift, loss.gate, decimal],
    ["Best held-out", loss.best, loss.gate, (value) => `${decimal(value)} at step ${integer(loss.best_step)}`],
    ["Loss on new experiences", prequential?.loss, noNews, (value) => `${decimal(value)} nats per byte`],
    ["Right on new experiences", prequential?.accuracy, noNews, (value) => `${percent(value)}, ${integer(prequential.tested)} asked`],
    ["Drifts noticed", drift?.detections, noNews, integer],
    ["Dead units", plasticity?.dead_units, "looked at with the examinations", (value) => `${integer(value)} of ${integer(plasticity.units)}`],
    ["Effective rank", plasticity?.eff_rank, "looked at with the examinations", (value) => `${decimal(value, 1)} of ${integer(plasticity.width)}`],
    ["Throughput", throughput.steps_per_second, idle, (value) => `${decimal(value, 1)} steps/s`],
    ["One step", throughput.step_ms, idle, (value) => duration(value / 1000)],
    ["Measuring and saving", cost.overhead_share, idle, (value) => `${percent(value)} of its time`],
    ["Learning rate", optimizer.lr, idle, (value) => value.toExponential(1)],
    ["Gradient norm", optimizer.grad_norm, idle, decimal],
    ["Experiences", buffer?.size, noBuffer, (value) => `${integer(value)} of ${integer(buffer.capacity)}`],
    ["Held out", buffer?.holdout, noBuffer, integer],
    ["Parameters", kernel.parameters, "counted when it trains", integer],
  ];
}

function renderNumbers() {
  const rows = numberRows();
  replace(byId("numbers"), rows.map(([name, value, reason]) => [name, value, reason]), () => rows.map(([name, value, reason, format]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? value : measured(value, format, reason ?? "")))));
}

function render() {
  renderHead();
  renderConvergence();
  renderNumbers();
  phiChart.redraw();
}

// -- actions -----------------------------------------------------------------------------------------------------

const ACTIONS = [
  { name: "pause", label: "Pause", when: ["training", "queued", "waiting", "stalled"] },
  { name: "resume", label: "Resume", when: ["paused", "stopped", "settled", "converged", "failed"] },
  { name: "checkpoint", label: "Save a checkpoint", when: ["training"] },
  { name: "stop", label: "Stop", when: ["training", "queued", "waiting", "paused", "stalled"] },
];

function renderActions() {
  const box = byId("kernel-actions");
  const focused = box.contains(document.activeElement) ? document.activeElement.textContent : null;
  const drawn = replace(box, [kernel.state, kernel.last_checkpoint !== null], () => [
    ...ACTIONS.filter(({ when }) => when.includes(kernel.state)).map(({ name, label }) => h("button", { class: "button", type: "button", onclick: () => act(name, label) }, label)),
    kernel.last_checkpoint === null ? null : h("a", { class: "button", href: `${path}/export?include=training`, download: "" }, "Download"),
    h("button", { class: "button", type: "button", dataset: { kind: "danger" }, onclick: askDelete }, "Delete"),
  ]);
  if (!drawn || focused === null) return;
  const buttons = [...box.children]; // who steers by keyboard goes on where they were, or at what came in its place
  (buttons.find((one) => one.textContent === focused) ?? buttons[0]).focus({ preventScroll: true });
}

async function act(name, label) {
  try {
    await api.post(`${path}/${name}`);
    toast(`${label}: accepted.`);
  } catch (error) {
    toast(`${label}: ${error.message}`, "bad");
  }
  await refresh();
}

function askDelete() {
  byId("delete-name").textContent = kernel.god_name;
  const dialog = byId("delete-dialog");
  dialog.returnValue = "cancel";
  dialog.showModal();
}

byId("delete-dialog").addEventListener("close", async (event) => {
  if (event.currentTarget.returnValue !== "delete") return;
  try {
    gone = true;
    await api.delete(path);
    location.assign("/kernels");
  } catch (error) {
    gone = false;
    toast(`It was not deleted: ${error.message}`, "bad");
  }
});

// -- wiring ------------------------------------------------------------------------------------------------------

async function readStatus() {
  kernel = await api.get(`${path}/status`);
  render();
}

async function readMetrics() {
  if (await metrics.update()) renderCharts();
  else if (metrics.length === 0) renderCharts();
}

async function refresh() {
  if (gone) return;
  const results = await Promise.allSettled([readStatus(), readMetrics(), checkpoints.read()]);
  const failed = results.find((result) => result.status === "rejected");
  if (!failed) return;
  byId("kernel-sentence").textContent = failed.reason.status === 404 ? "There is no such kernel. It may have been deleted." : `Not up to date: ${failed.reason.message}`;
}

const quietly = (run) => () => gone || run().catch((error) => console.debug("kernel:", error.message));
const metricsSoon = throttle(quietly(readMetrics), 500);
const statusSoon = throttle(quietly(readStatus), 2000);
const checkpointsSoon = throttle(quietly(() => checkpoints.read()), 1000);
const speakSoon = throttle(() => announce(byId("kernel-sentence").textContent), 30_000);

live.on("kernel.metric", (data) => {
  if (data.kernel_id !== id) return;
  if (kernel && data.state) kernel.state = data.state;
  metricsSoon();
  statusSoon();
  speakSoon();
});
live.on("kernel.state", (data) => {
  if (data.kernel_id !== id) return;
  if (data.state === "deleted") {
    gone = true;
    byId("kernel-sentence").textContent = "This kernel was deleted.";
    byId("kernel-actions").replaceChildren();
    return;
  }
  const newest = metrics.columns.step.at(-1);
  if (isNumber(newest) && isNumber(data.step) && data.step < newest) metrics.reset();
  announce(`This kernel is ${data.state}`);
  refresh();
});
live.on("kernel.checkpoint", (data) => data.kernel_id === id && checkpointsSoon());
live.on("reset", () => metrics.reset());
byId("loss-scale").addEventListener("click", (event) => {
  scaleChosen = true;
  setLossScale(event.currentTarget.getAttribute("aria-pressed") !== "true");
});
for (const twin of document.querySelectorAll(".twin")) twin.addEventListener("toggle", renderCharts);
wireForms(path, refresh);
keepFresh(refresh);
