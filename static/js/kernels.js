/* The list of kernels: filtered, sorted, and chosen from to be compared. */

import { announce, byId } from "./dom.js";
import { api } from "./api.js";
import { integer, isNumber } from "./format.js";
import { keepFresh, live, throttle } from "./shell.js";
import { compare, isCompared, MOST, refreshNumbers, reset, update, wireCompare } from "./compare.js";
import { domainText, mergeEvent, renderKernels } from "./kernel_view.js";
import { ratioOf } from "./sky.js";
import "./kernel_spawn.js";

const NOTHING = "No kernel yet. Spawn one with the form on this page: a domain and a few examples are enough.";
const FILTERS = { q: "filter-text", state: "filter-state", sort: "filter-sort" };
const ASCENDING = { loss: (kernel) => kernel.holdout_loss, gain: (kernel) => ratioOf(kernel.holdout_loss, kernel.baseline_loss), phi: (kernel) => (isNumber(kernel.phi) ? -kernel.phi : null), step: (kernel) => -kernel.step };
let kernels = [];
let chosen = new Set();
let quantity = "";

// -- filter and order --------------------------------------------------------------------------------------------

function wanted() {
  const text = byId(FILTERS.q).value.trim().toLowerCase();
  const state = byId(FILTERS.state).value;
  const found = kernels.filter((kernel) => (state === "" || kernel.state === state)
    && `${kernel.god_name} ${domainText(kernel.domain)} ${kernel.kernel_id}`.toLowerCase().includes(text));
  const valueOf = ASCENDING[byId(FILTERS.sort).value];
  return valueOf ? [...found].sort((a, b) => (valueOf(a) ?? Infinity) - (valueOf(b) ?? Infinity)) : found;
}

function render() {
  const shown = wanted();
  const all = `${integer(kernels.length)} in all`;
  byId("kernel-count").textContent = kernels.length === 0 ? "" : shown.length < kernels.length ? `${integer(shown.length)} of ${integer(kernels.length)}` : all;
  byId("kernel-filter").hidden = kernels.length < 2;
  byId("compare-jump").hidden = chosen.size === 0;
  byId("compare-jump").firstElementChild.textContent = chosen.size === 1 ? "See the one you chose" : `See ${chosen.size} side by side`;
  renderKernels(byId("kernel-table"), shown, kernels.length === 0 ? NOTHING : "No kernel fits. Change the filter above.", { chosen, room: chosen.size < MOST, choose });
}

function readAddress() {
  const query = new URLSearchParams(location.search);
  for (const [name, id] of Object.entries(FILTERS)) byId(id).value = query.get(name) ?? "";
  for (const id of [FILTERS.state, FILTERS.sort]) if (byId(id).selectedIndex < 0) byId(id).selectedIndex = 0;
  chosen = new Set((query.get("compare") ?? "").split(",").filter(Boolean).slice(0, MOST));
  quantity = query.get("show") ?? "";
}

function writeAddress() {
  const query = new URLSearchParams();
  for (const [name, id] of Object.entries(FILTERS)) if (byId(id).value.trim()) query.set(name, byId(id).value.trim());
  if (chosen.size > 0) query.set("compare", [...chosen].join(","));
  if (chosen.size > 0 && quantity) query.set("show", quantity);
  const text = query.toString().replaceAll("%2C", ",");
  history.replaceState(null, "", `/kernels${text ? `?${text}` : ""}`);
}

// -- compare -----------------------------------------------------------------------------------------------------

function choose(id, on) {
  if (on) chosen.add(id);
  else chosen.delete(id);
  writeAddress();
  render();
  showComparison();
}

async function showComparison() {
  try {
    await compare([...chosen], (id) => kernels.find(({ kernel_id }) => kernel_id === id)?.god_name);
  } catch (error) {
    byId("compare-note").textContent = `not up to date: ${error.message}`;
  }
}

/** Those that a link names but that were deleted since cannot be compared any more. */
function dropDeleted() {
  const gone = [...chosen].filter((id) => !kernels.some((kernel) => kernel.kernel_id === id));
  if (gone.length === 0) return false;
  for (const id of gone) chosen.delete(id);
  writeAddress();
  return true;
}

async function readKernels() {
  try {
    kernels = (await api.get("/olympus/kernels")).kernels;
  } catch (error) {
    byId("kernel-count").textContent = `not up to date: ${error.message}`;
    return;
  }
  const dropped = dropDeleted();
  render();
  if (dropped) await showComparison();
}

const refresh = () => Promise.all([readKernels(), showComparison()]);

// -- wiring ------------------------------------------------------------------------------------------------------

const quietly = (run) => () => run().catch((error) => console.debug("kernels:", error.message));
const renderSoon = throttle(render, 250);
const refreshSoon = throttle(refresh, 1500);
const updateSoon = throttle(quietly(update), 1000);
const numbersSoon = throttle(quietly(refreshNumbers), 3000);

live.on("kernel.metric", (data) => {
  if (mergeEvent(kernels, data)) renderSoon();
  else refreshSoon();
  if (!isCompared(data.kernel_id)) return;
  updateSoon();
  numbersSoon();
});
live.on("kernel.state", (data) => {
  announce(`A kernel is ${data.state}`);
  refreshSoon();
});
live.on("reset", reset);
for (const id of Object.values(FILTERS)) {
  byId(id).addEventListener("input", () => {
    writeAddress();
    render();
  });
}
byId("compare-none").addEventListener("click", () => {
  chosen.clear();
  writeAddress();
  render();
  showComparison();
  byId("list-title").scrollIntoView({ block: "nearest" });
});

readAddress();
wireCompare(quantity, (value) => {
  quantity = value;
  writeAddress();
});
keepFresh(refresh);
