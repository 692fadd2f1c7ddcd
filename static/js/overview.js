/* The overview: one sentence about the server, the chart of kernels, health, and what happened lately. */

import { announce, byId, h, reconcile, replace } from "./dom.js";
import { api } from "./api.js";
import { ago, bytes, decimal, duration, integer, isNumber, missing, percent } from "./format.js";
import { keepFresh, live, readStatus, throttle } from "./shell.js";
import { domainText, kernelPath, mergeEvent, renderKernels, stateBadge } from "./kernel_view.js";
import { Metrics } from "./metrics.js";
import { relationsOf, Sky, TRAIL_COLUMNS, trailOf } from "./sky.js";

const TRAILS = 12; // kernels whose whole path is drawn
const TRAIL_POINTS = 160;
const EVENTS = 12;

const sky = new Sky(byId("sky"));
const lives = new Map(); // kernel id -> Metrics
const trails = new Map();
let relations = [];
let kernels = [];
let status = null;

// -- the bulletin ------------------------------------------------------------------------------------------------

const COUNT_WORDS = { 2: "Two", 3: "Three", 4: "Four", 5: "Five" };

function modelSentence(model) {
  const { name, stage } = model;
  if (stage === "ready") return `The model ${name} is ready.`;
  if (stage === "loading") return `The model ${name} is loading.`;
  if (stage === "failed") return `The model ${name} could not be loaded.`;
  return "This server runs without a language model.";
}

function kernelSentence(list, experiences) {
  const learning = list.filter((kernel) => kernel.state === "training").length;
  const from = isNumber(experiences) ? ` from ${integer(experiences)} ${experiences === 1 ? "experience" : "experiences"}` : "";
  if (list.length === 0) return "No kernel has been spawned yet.";
  if (learning === 0 && (experiences ?? 0) === 0) return list.length === 1 ? "Its one kernel waits for a first experience." : "Its kernels wait for a first experience.";
  if (learning === 0) return list.length === 1 ? "Its one kernel is not training." : `None of ${integer(list.length)} kernels is training.`;
  return `${learning === 1 ? "One kernel is" : `${COUNT_WORDS[learning] ?? integer(learning)} kernels are`} learning${from}.`;
}

function renderBulletin() {
  const { model } = status;
  const sentences = [modelSentence(model), kernelSentence(kernels, status.history?.count)];
  replace(byId("bulletin-title"), sentences, () => [h("span", {}, wholeName(sentences[0], model.name)), " ", h("span", {}, sentences[1])]);
  const up = isNumber(status.uptime_s) ? `up ${duration(status.uptime_s)}` : null;
  byId("bulletin-eyebrow").textContent = ["Right now", up].filter(Boolean).join(", ");
  const box = byId("model-progress");
  box.hidden = model.stage !== "loading";
  replace(box, model, () => progress(model));
}

/** `text` with the model's name kept on one line where there is room. */
function wholeName(text, name) {
  const [before, after] = name ? text.split(name) : [text];
  return after === undefined ? text : [before, h("span", { class: "whole" }, name), after];
}

function progress(model) {
  const known = isNumber(model.fraction);
  const fill = h("div", { class: "meter-fill" });
  fill.style.width = known ? `${100 * model.fraction}%` : "0";
  const text = `${model.detail || "starting"}${known ? `, ${percent(model.fraction)}` : ""}`;
  return [
    h("p", { class: "hint" }, text),
    known ? h("div", { class: "meter", role: "progressbar", "aria-label": "Loading the model", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * model.fraction) }, fill) : null,
  ];
}

// -- health ------------------------------------------------------------------------------------------------------

async function readReadiness() {
  // 503 is an answer here, not a failure: the body says which check is not met.
  const response = await fetch("/readyz", { cache: "no-store", headers: { Accept: "application/json" } });
  return (await response.json()).checks;
}

const CHECK_NAMES = { data_directory: "data directory", stopping: "not stopping" };

function renderChecks(checks) {
  const items = Object.entries(checks).map(([name, detail]) => ({ name, detail }));
  reconcile(byId("checks"), items, (item) => item.name, ({ name, detail }) => {
    const ok = detail === "ok";
    return h("li", {}, stateBadge(ok ? "ok" : detail.startsWith("loading") ? "queued" : "stalled", CHECK_NAMES[name] ?? name), h("span", { class: "detail" }, ok ? "ok" : detail));
  });
}

function renderFacts() {
  const { process = {}, history = {}, admission = {} } = status;
  const rows = [
    ["Experiences", isNumber(history.count) ? integer(history.count) : null],
    ["Kernels", integer(kernels.length)],
    ["Chats now", isNumber(admission.chats) ? integer(admission.chats) : null],
    ["Memory", isNumber(process.rss_bytes) ? bytes(process.rss_bytes) : null],
    ["Threads", isNumber(process.threads) ? integer(process.threads) : null],
  ];
  replace(byId("facts"), rows, () => rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value ?? missing("this server does not report it")))));
}

// -- kernels -----------------------------------------------------------------------------------------------------

function renderKernelViews() {
  renderKernels(byId("kernel-table"), kernels, "No kernel has been spawned yet.");
  sky.show(kernels, trails, relations);
  if (status) renderBulletin();
}

async function readTrails() {
  await Promise.all(kernels.slice(0, TRAILS).map(async ({ kernel_id: id }) => {
    if (!lives.has(id)) lives.set(id, new Metrics(`/olympus${kernelPath(id)}/metrics`, { columns: TRAIL_COLUMNS, points: TRAIL_POINTS }));
    if (await lives.get(id).update()) trails.set(id, trailOf(lives.get(id).columns));
  }));
  sky.show(kernels, trails, relations);
}

async function readRelations() {
  relations = relationsOf(await api.get("/olympus/lineage"));
  sky.show(kernels, trails, relations);
  renderRelations();
}

/** The lines of the chart in words. */
function renderRelations() {
  const nameOf = (id) => kernels.find((kernel) => kernel.kernel_id === id)?.god_name ?? id;
  byId("relations-box").hidden = relations.length === 0;
  replace(byId("relations").tBodies[0], relations.map((line) => [line, nameOf(line.from), nameOf(line.to)]), () => relations.map(({ from, to, kind, inherited, distance }) =>
    h("tr", {}, h("th", { scope: "row" }, kernelLink(from)), h("td", {}, kind === "near" ? "lies next to" : inherited ? "gave its weights to" : "is a parent of"), h("td", {}, kernelLink(to)),
      h("td", { class: "num" }, isNumber(distance) ? decimal(distance) : missing("they share no read-out, or were not examined yet")))));
}

async function readKernels() {
  kernels = (await api.get("/olympus/kernels")).kernels;
  renderKernelViews();
  relationsSoon();
  await readTrails();
}

// -- what happened -----------------------------------------------------------------------------------------------

async function readHistory() {
  const [{ experiences }, { sessions }] = await Promise.all([api.get("/olympus/history?limit=6"), api.get("/olympus/sessions")]);
  const list = byId("experiences");
  byId("first-steps").hidden = sessions.length > 0 || experiences.some((item) => item.source === "chat");
  if (experiences.length === 0) {
    list.replaceChildren(h("li", { class: "empty" }, "None yet. The first chat becomes experience number one."));
    return;
  }
  reconcile(list, experiences, (item) => item.id, (item) => h("li", {},
    h("p", { class: "said" }, item.observation),
    h("p", { class: "answered" }, item.action),
    h("p", { class: "about" }, h("span", {}, `#${item.id}`), h("span", {}, `domain ${item.domain}`), h("span", {}, `from ${item.source}`),
      isNumber(item.score) ? h("span", {}, item.score > 0 ? "judged good" : "judged bad") : null, ago(item.created_at))));
}

function addEvent(...parts) {
  const list = byId("events");
  list.querySelector(".empty")?.remove();
  list.prepend(h("li", {}, ago(Date.now() / 1000), h("span", {}, ...parts)));
  while (list.children.length > EVENTS) list.lastElementChild.remove();
}

function kernelLink(id) {
  const name = kernels.find((kernel) => kernel.kernel_id === id)?.god_name ?? id;
  return h("a", { href: kernelPath(id) }, name);
}

// -- wiring ------------------------------------------------------------------------------------------------------

async function refresh() {
  const results = await Promise.allSettled([
    readStatus().then((value) => { status = value; }),
    readKernels(),
    readHistory(),
    readReadiness().then(renderChecks),
  ]);
  for (const result of results) if (result.status === "rejected") console.debug("overview:", result.reason.message);
  if (status) {
    renderBulletin();
    renderFacts();
  }
}

const relationsSoon = throttle(() => readRelations().catch((error) => console.debug("relations:", error.message)), 10_000); // they change slowly
const renderSoon = throttle(renderKernelViews, 250);
const refreshSoon = throttle(refresh, 2000);
const trailsSoon = throttle(() => readTrails().catch((error) => console.debug("trails:", error.message)), 4000);

live.on("kernel.metric", (data) => {
  if (!mergeEvent(kernels, data)) refreshSoon();
  renderSoon();
  trailsSoon();
});
live.on("kernel.state", (data) => {
  addEvent(kernelLink(data.kernel_id), ` is ${data.state}`, isNumber(data.step) ? ` at step ${integer(data.step)}` : "", data.reason ? `: ${data.reason}` : "");
  announce(`A kernel is ${data.state}`);
  lives.delete(data.kernel_id); // after a restore its steps begin earlier
  refreshSoon();
});
live.on("reset", () => lives.clear()); // steps may have gone back meanwhile
live.on("kernel.checkpoint", (data) => {
  addEvent(kernelLink(data.kernel_id), ` saved a checkpoint at step ${integer(data.step)}`, isNumber(data.holdout_loss) ? `, held-out loss ${decimal(data.holdout_loss)}` : "");
});
live.on("history", (data) => {
  addEvent(`Experience #${data.newest_id} in domain ${domainText(data.domain)}`);
  refreshSoon();
});
live.on("model", (model) => {
  if (!status) return;
  if (model.stage !== status.model.stage) addEvent(modelSentence(model), model.detail ? ` ${model.detail}` : "");
  status.model = model;
  renderBulletin();
  if (model.stage !== "loading") refreshSoon();
});

const command = `curl -N ${location.origin}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
  -d '{"stream": true, "messages": [{"role": "user",
    "content": "What is the capital of France?"}]}'`;
byId("curl-command").textContent = command;
byId("copy-curl").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(command);
    byId("copy-curl").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("curl-command")); // no clipboard outside https and localhost
    byId("copy-curl").textContent = "Press Ctrl+C";
  }
  setTimeout(() => { byId("copy-curl").textContent = "Copy"; }, 3000);
});

keepFresh(refresh);
setInterval(() => live.state === "live" && refreshSoon(), 30_000);
