/* Kernels side by side: one chart of what is chosen, and a table of their numbers and of how they were made.

   Only the quantity that is shown is fetched; each curve has at most 2,000 points in view. Looking closer fetches the
   finer rows from where the view begins; what is measured meanwhile is fetched by what is new. The choice is in the
   address, so that a link shows the same. */

import { byId, h, replace } from "./dom.js";
import { api } from "./api.js";
import { StepChart } from "./chart.js";
import { decimal, integer, isNumber, measured } from "./format.js";
import { domainText, kernelPath, stateBadge } from "./kernel_view.js";
import { Metrics } from "./metrics.js";
import { ratioOf } from "./sky.js";

export const MOST = 6;
const LOOK_CLOSER_AFTER = 200; // ms without another zoom
const LOOKS = [ // token and dash: the colour is not the only sign
  ["--series-1", null], ["--series-2", [10, 4]], ["--series-3", [3, 3]], ["--series-4", [12, 3, 3, 3]], ["--series-5", [6, 2]], ["--series-6", [1, 4]],
];
const QUANTITIES = {
  holdout_loss: { words: "Held-out loss, nats per byte", columns: ["holdout_loss"] },
  ratio: { words: "Held-out loss over the baseline's: below 1 it has learned", columns: ["holdout_loss", "baseline_loss"], of: ratioOf },
  loss: { words: "Training loss, nats per byte", columns: ["loss"] },
  phi: { words: "Integration Φ", columns: ["phi"] },
  basin_drift: { words: "Basin drift", columns: ["basin_drift"] },
  step_ms: { words: "Milliseconds per step", columns: ["step_ms"] },
};

let drawn = false; // what was chosen last was read and drawn
let lives = []; // [{id, curves: quantity -> Metrics, closer: columns or null, status}]
let quantity = "holdout_loss"; // what is shown
let wanted = quantity; // what was chosen last: shown as soon as its rows are here
let listedName = () => undefined; // of an id, from the list as far as that is read
let wait = null;
let request = null;

const chart = new StepChart(byId("compare-chart"), { series: [], height: 340, sync: "compare", range: around, onView: (view) => { clearTimeout(wait); wait = setTimeout(() => lookCloser(view), LOOK_CLOSER_AFTER); } });

function around(_, low, high) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  const space = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.05;
  return [low >= 0 ? Math.max(0, low - space) : low - space, high + space];
}

// -- the curves --------------------------------------------------------------------------------------------------

/** The measurements of one quantity of `life`; nothing is fetched yet when it is looked at first. */
function curveOf(life, name = quantity) {
  if (!life.curves.has(name)) life.curves.set(name, new Metrics(`${pathOf(life.id)}/metrics`, { columns: QUANTITIES[name].columns }));
  return life.curves.get(name);
}

/** Rows that are shown: those from where the view begins, as fine as they were fetched, and the older ones. */
function rowsOf(life) {
  const { closer } = life;
  const coarse = curveOf(life).columns;
  if (closer === null || closer.step.length === 0) return coarse;
  const before = coarse.step.findIndex((step) => step >= closer.step[0]);
  const after = coarse.step.findIndex((step) => step > closer.step.at(-1));
  return Object.fromEntries(Object.keys(coarse).map((name) => [name, [
    ...coarse[name].slice(0, before < 0 ? undefined : before), ...closer[name], ...(after < 0 ? [] : coarse[name].slice(after)),
  ]]));
}

function valuesOf(rows) {
  const { columns: [name, other], of } = QUANTITIES[quantity];
  return of ? rows[name].map((value, index) => of(value, rows[other][index])) : rows[name];
}

/** Curves over steps of their own as columns over all steps: [steps, ...values]. */
export function aligned(curves) {
  const steps = Float64Array.from(curves.flatMap(({ step }) => step)).sort();
  const union = steps.filter((step, index) => index === 0 || step !== steps[index - 1]);
  return [union, ...curves.map(({ step, values }) => {
    const column = new Array(union.length).fill(null);
    let place = 0;
    for (let index = 0; index < step.length; index += 1) {
      while (union[place] < step[index]) place += 1;
      column[place] = values[index];
    }
    return column;
  })];
}

function draw() {
  const curves = lives.map(rowsOf).map((rows) => ({ step: rows.step, values: valuesOf(rows) }));
  const some = curves.some(({ values }) => values.some((value) => value !== null));
  byId("compare-wait").hidden = some || lives.length === 0;
  byId("compare-chart").hidden = !some;
  if (some) chart.setData(aligned(curves));
  byId("compare-summary").textContent = summary(curves);
}

function summary(curves) {
  const newest = curves.map(({ values }, index) => [nameOf(lives[index]), values.findLast((value) => value !== null)]).filter(([, value]) => isNumber(value));
  if (newest.length === 0) return "";
  return `${QUANTITIES[quantity].words}. Now: ${newest.map(([name, value]) => `${name} ${decimal(value)}`).join(", ")}.`;
}

function nameOf(life) {
  return knownName(life) ?? life.id;
}

function knownName(life) {
  return life.status?.god_name ?? listedName(life.id);
}

async function lookCloser(view) {
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  const since = view === null ? null : Math.max(0, Math.floor(view.min) - 1);
  try {
    await Promise.all(lives.map(async (life) => {
      life.closer = since === null ? null : await curveOf(life).rows(since, signal);
    }));
    draw();
  } catch (error) {
    if (error.name !== "AbortError") console.debug("compare:", error.message);
  }
}

function pathOf(id) {
  return `/olympus${kernelPath(id)}`;
}

// -- the table ---------------------------------------------------------------------------------------------------

const NUMBERS = [
  ["State", (status) => status.state, (value) => stateBadge(value)],
  ["Domain", (status) => status.domain, domainText],
  ["Step", (status) => status.step, integer],
  ["Held-out loss", (status) => status.loss.holdout, decimal],
  ["Baseline", (status) => status.loss.baseline_context_free, decimal],
  ["Best held-out", (status) => status.loss.best, decimal],
  ["Φ", (status) => status.phi.value, decimal],
  ["κ, coupling", (status) => status.kappa, decimal],
  ["Basin drift", (status) => status.basin.drift, decimal],
  ["Experiences", (status) => status.experiences, integer],
  ["Parameters", (status) => status.parameters, integer],
];

/** How they were made: only what differs between them. */
function differences(statuses) {
  const flat = statuses.map(({ config }) => ({ ...config?.network, ...config?.training }));
  const names = [...new Set(flat.flatMap(Object.keys))].filter((name) => new Set(flat.map((plan) => JSON.stringify(plan[name] ?? null))).size > 1);
  return names.map((name) => [name.replaceAll("_", " "), flat.map((plan) => plan[name])]);
}

function renderTable() {
  const statuses = lives.map(({ status }) => status).filter(Boolean);
  if (statuses.length < lives.length) return;
  const rows = NUMBERS.map(([name, valueOf, format]) => [name, statuses.map(valueOf), format]);
  const plan = differences(statuses);
  replace(byId("compare-table"), [rows.map(([name, values]) => [name, values]), plan], () => [
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Measured"), lives.map((life, index) => h("th", { scope: "col", class: "num" }, lookMark(index), h("a", { href: kernelPath(life.id) }, nameOf(life)))))),
    h("tbody", {}, rows.map(([name, values, format]) => h("tr", {}, h("th", { scope: "row" }, name), values.map((value) => h("td", { class: "num" }, typeof value === "string" ? format(value) : measured(value, format)))))),
    plan.length === 0 ? null : h("tbody", {}, h("tr", {}, h("th", { scope: "rowgroup", colspan: lives.length + 1, class: "group" }, "Made differently")),
      plan.map(([name, values]) => h("tr", {}, h("th", { scope: "row" }, name), values.map((value) => h("td", { class: "num" }, value === undefined ? "–" : String(value)))))),
  ]);
}

function lookMark(index) {
  return h("span", { class: "look", dataset: { look: index + 1 }, "aria-hidden": "true" });
}

// -- choosing ----------------------------------------------------------------------------------------------------

/** Compare the kernels with these ids; keeps what is known of those that were compared before. `nameIn(id)`: from the list. */
export async function compare(ids, nameIn) {
  listedName = nameIn;
  const same = ids.length === lives.length && ids.every((id, index) => id === lives[index].id);
  lives = ids.map((id) => lives.find((life) => life.id === id) ?? { id, curves: new Map(), closer: null, status: null });
  byId("compare").hidden = ids.length === 0;
  byId("compare-note").textContent = ids.length === 1 ? "Choose another one to see both in one chart." : `${ids.length} of at most ${MOST}`;
  if (ids.length === 0 || (same && drawn)) return;
  drawn = false;
  quantity = wanted;
  const mine = lives;
  const curves = Promise.all(lives.map((life) => curveOf(life).update())); // first: a browser asks for six things at once
  const statuses = readStatuses();
  await Promise.all([statuses, curves.then(async () => {
    if (!mine.every(knownName)) await statuses;
    if (mine === lives) drawAnew(); // else others were chosen meanwhile
  })]);
}

function drawAnew() {
  for (const life of lives) life.closer = null;
  chart.clear(lives.map((life, index) => ({ label: nameOf(life), token: LOOKS[index][0], dash: LOOKS[index][1], width: 2, points: true })));
  draw();
  drawn = true;
}

async function readStatuses() {
  await Promise.all(lives.map(async (life) => { life.status = await api.get(`${pathOf(life.id)}/status`); }));
  renderTable();
}

/** Show another quantity, the same part of the lives. */
async function show(name) {
  wanted = name;
  const mine = lives;
  await Promise.all(lives.map((life) => curveOf(life, name).update()));
  if (mine !== lives || name !== wanted) return; // chosen anew meanwhile
  quantity = name;
  for (const life of lives) life.closer = null;
  draw();
  if (chart.view !== null) await lookCloser(chart.view);
}

/** Fetch what is new of all of them. */
export async function update() {
  if (lives.length === 0) return;
  const some = await Promise.all(lives.map((life) => curveOf(life).update()));
  if (some.some(Boolean)) draw();
}

/** The numbers of the table anew. */
export async function refreshNumbers() {
  if (lives.length > 0) await readStatuses();
}

export function reset() {
  for (const life of lives) for (const curve of life.curves.values()) curve.reset();
}

export function isCompared(id) {
  return lives.some((life) => life.id === id);
}

/** Wire the choice of the quantity and the buttons that move the view. `changed(quantity)` keeps it in the address. */
export function wireCompare(first, changed) {
  if (first in QUANTITIES) quantity = wanted = first;
  const radio = document.querySelector(`input[name=quantity][value=${quantity}]`);
  radio.checked = true;
  byId("compare-quantity").addEventListener("change", (event) => {
    changed(event.target.value);
    show(event.target.value).catch((error) => { byId("compare-note").textContent = `not up to date: ${error.message}`; });
  });
  const moves = { "view-earlier": { shift: -0.5 }, "view-later": { shift: 0.5 }, "view-closer": { factor: 0.5 }, "view-wider": { factor: 2 } };
  for (const [id, move] of Object.entries(moves)) byId(id).addEventListener("click", () => chart.move(move));
  byId("view-all").addEventListener("click", () => chart.setView(null));
}
