/* The page of the cartridges: what serves, one domain with its run, triggers and lineage, and all decisions. */

import { announce, byId, h, reconcile, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { ago, bytes, integer } from "./format.js";
import { keepFresh, live, throttle } from "./shell.js";
import { badge, domainPath, lineageItem, lineageRow, questionFor, servingRow, staleMark } from "./cartridge_view.js";
import { renderRun, renderTriggers } from "./distillation_view.js";
import { OPEN } from "./triggers.js";
import { confirmed } from "./dialog.js";
import { RunMetrics } from "./run_metrics.js";
import { wireTry } from "./try_cartridge.js";

const RUNS = 200;
const RUNS_SHOWN = 12;
let cartridges = [];
let runs = [];
let schedule = { domains: [], presets: [], automatic: false, next_look: null, working: false };
let loaded = false;
let refreshing = 0; // of several answers only that to the newest question counts
let tellings = 0;
const toldAt = new Map(); // run id -> the number of its newest telling
let wanted = readAddress();
let metrics = null; // of the run that is shown
let shown = { id: null, attempts: 0 };

// -- what is known -----------------------------------------------------------------------------------------------

function readAddress() {
  const query = new URLSearchParams(location.search);
  return { domain: query.get("domain"), run: query.get("run") };
}

function domains() {
  return [...new Set([...schedule.domains.map((item) => item.domain), ...cartridges.map((item) => item.domain), ...runs.map((item) => item.domain)])].sort();
}

/** The domain of the address; otherwise where something happens, serves, or was lived through. */
function domain() {
  const all = domains();
  if (wanted.domain) return wanted.domain;
  const busy = runs.find((item) => OPEN.includes(item.state));
  return busy?.domain ?? runs[0]?.domain ?? cartridges[0]?.domain ?? all[0] ?? null;
}

const ofDomain = (items, name) => items.filter((item) => item.domain === name);
const outlookOf = (name) => schedule.domains.find((item) => item.domain === name) ?? null;
const servingOf = (name) => cartridges.find((item) => item.domain === name && item.state === "serving") ?? null;

function run() {
  const own = ofDomain(runs, domain());
  return own.find((item) => item.id === wanted.run) ?? own.find((item) => OPEN.includes(item.state)) ?? own[0] ?? null;
}

// -- what serves -------------------------------------------------------------------------------------------------

function renderServing() {
  const all = domains();
  const body = byId("serving-table").tBodies[0];
  byId("serving-table").tHead.hidden = all.length === 0;
  byId("serving-count").textContent = all.length === 0 ? "" : `${integer(all.filter(servingOf).length)} of ${integer(all.length)} ${all.length === 1 ? "domain" : "domains"}`;
  byId("first-steps").hidden = !loaded || cartridges.length > 0 || runs.length > 0;
  if (all.length === 0) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: 5, class: "empty wide" }, "The history is empty, so there is nothing to distil yet.")));
    return;
  }
  const items = all.map((name) => {
    const serving = servingOf(name);
    const newest = ofDomain(runs, name)[0];
    return {
      domain: name, selected: name === domain(), experiences: experiencesOf(name),
      serving: serving && { id: serving.id, slots: serving.slots, bytes: serving.bytes, stale: serving.stale },
      candidates: ofDomain(cartridges, name).filter((item) => item.state === "candidate").length,
      run: newest && { state: newest.state, created_at: newest.created_at, progress: { fraction: newest.progress.fraction } },
    };
  });
  reconcile(body, items, (item) => item.domain, (item) => servingRow(item, openInPlace));
}

let counts = null; // domain -> experiences, once they are known
const experiencesOf = (name) => (counts === null ? null : counts.get(name) ?? 0);

// -- the form ----------------------------------------------------------------------------------------------------

function renderForm() {
  const select = byId("distil-domain");
  const names = schedule.domains.map((item) => item.domain);
  const chosen = select.value || domain();
  if (replace(select, names, () => (names.length === 0 ? h("option", { value: "" }, "none yet") : names.map((name) => h("option", { value: name }, name)))) && names.includes(chosen)) select.value = chosen;
  replace(byId("distil-presets"), schedule.presets, () => ["", ...schedule.presets].map((name) =>
    h("label", {}, h("input", { type: "radio", name: "preset", value: name, checked: name === "" }), " ", h("span", {}, name || "as the settings say"))));
  byId("distil-start").disabled = names.length === 0 || !schedule.working;
  renderFormHint();
}

function renderFormHint() {
  const name = byId("distil-domain").value;
  const count = experiencesOf(name);
  byId("distil-domain-hint").textContent = !name ? "Nothing has been lived through yet: chat, or import a history."
    : !schedule.working ? "Runs begin when the language model is loaded."
      : count === null ? "" : `${integer(count)} ${count === 1 ? "experience" : "experiences"} to learn from.`;
}

function showError(text) {
  byId("distil-error").hidden = text === "";
  byId("distil-error").textContent = text;
}

byId("distil-domain").addEventListener("change", renderFormHint);
byId("distil-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  showError("");
  const form = event.currentTarget;
  const name = form.elements.domain.value;
  const preset = form.elements.preset.value;
  const serving = servingOf(name);
  const sure = await confirmed({
    title: `Distil ${name}?`, action: "Distil",
    text: `A run with ${preset ? `the preset ${preset}` : "the preset of the settings"} works in the background and gives way to chats.`,
    notes: [serving ? `${serving.id} goes on serving until a candidate passes the gate.` : "Its cartridge serves at once if it passes the gate."],
  });
  if (!sure) return;
  try {
    const made = await api.post("/olympus/distillation/runs", preset ? { domain: name, preset } : { domain: name });
    mergeRun(made);
    announce(`A distillation of ${name} was started`);
    go(name, made.id);
    byId("run").scrollIntoView({ block: "nearest" });
  } catch (error) {
    showError(`It was not started: ${error.message}`);
  }
});

// -- one domain --------------------------------------------------------------------------------------------------

function renderDomain() {
  const name = domain();
  byId("domain-view").hidden = name === null || !domains().includes(name);
  if (byId("domain-view").hidden) return;
  const serving = servingOf(name);
  byId("domain-title").textContent = name;
  replace(byId("domain-state"), [serving?.id ?? null, serving?.stale], () => (serving ? [badge("serving", serving.id), serving.stale ? [" ", staleMark()] : null].flat() : badge("candidate", "nothing serves")));
  byId("domain-sentence").textContent = sentenceOf(name, serving);
  renderDomainActions(serving);
  renderTriggers(outlookOf(name), schedule);
  renderLineage(name);
  renderRuns(name);
  byId("try").hidden = !serving;
  byId("try-note").textContent = serving ? `answered with ${serving.id} and without; nothing is written down` : "";
  renderRunPanel();
}

function sentenceOf(name, serving) {
  if (!serving) return "Chats in this domain are answered without a cartridge.";
  const arm = (which, key) => serving.metrics?.evaluation?.arms?.[which]?.[key];
  const [prompt, attended] = [arm("long_prompt", "attended"), arm("cartridge", "attended")];
  const cost = prompt && attended ? ` Where the long prompt needed ${integer(prompt)} attended tokens, it needs ${integer(attended)}.` : "";
  const stale = serving.stale ? " It is stale: something that it learned was corrected or deleted since. A new run forgets it." : "";
  return `${integer(serving.slots)} slots, ${bytes(serving.bytes)}, learned from ${integer(serving.experiences)} experiences.${cost}${stale}`;
}

function renderDomainActions(serving) {
  const item = serving && lineageItem(serving, cartridges);
  replace(byId("domain-actions"), item && [item.id, item.rollbackTo, item.stale], () => (item ? [
    h("a", { class: "button", dataset: { kind: "primary" }, href: `/chat?domain=${encodeURIComponent(item.domain)}&memory=1` }, "Chat with it"),
    item.rollbackTo ? h("button", { class: "button", type: "button", onclick: () => act("rollback", item) }, "Roll back") : null,
    h("button", { class: "button", type: "button", dataset: { kind: "danger" }, onclick: () => act("retire", item) }, "Retire"),
  ] : []));
}

function renderLineage(name) {
  const own = ofDomain(cartridges, name);
  const body = byId("lineage-table").tBodies[0];
  byId("lineage-table").tHead.hidden = own.length === 0;
  byId("lineage-note").textContent = own.length === 0 ? "" : `${integer(own.length)} in all, newest first`;
  if (own.length === 0) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: 9, class: "empty wide" }, "No cartridge yet. A run that gets as far as its gate leaves one here, passed or not.")));
    return;
  }
  reconcile(body, own.map((item) => lineageItem(item, cartridges)), (item) => item.id, (item) => lineageRow(item, act, openInPlace));
}

function renderRuns(name) {
  const own = ofDomain(runs, name);
  const current = run()?.id;
  const list = byId("runs");
  if (own.length === 0) {
    list.replaceChildren(h("li", { class: "empty" }, "None yet."));
    return;
  }
  const items = own.slice(0, RUNS_SHOWN).map(({ id, state, trigger, created_at, progress }) => ({ id, state, trigger, created_at, cartridge: progress.cartridge ?? null, current: id === current }));
  reconcile(list, items, (item) => item.id, (item) => h("li", {},
    h("a", { href: domainPath(name, item.id), onclick: openInPlace, "aria-current": item.current ? "true" : null }, ago(item.created_at)),
    badge(item.state), h("span", { class: "hint" }, [item.trigger === "manual" ? "by hand" : item.trigger, item.cartridge].filter(Boolean).join(", "))));
}

function renderRunPanel() {
  const current = run();
  const attempts = current?.progress.attempts ?? 0;
  if (current?.id !== shown.id || attempts < shown.attempts || (attempts > shown.attempts && shown.attempts > 0)) metrics = current && new RunMetrics(current.id);
  shown = { id: current?.id ?? null, attempts };
  renderRun(current, metrics);
}

async function readMetrics() {
  const own = metrics;
  if (own && (await own.update()) && own === metrics) renderRun(run(), metrics);
}

// -- decisions ---------------------------------------------------------------------------------------------------

async function act(name, item) {
  const answer = await confirmed(questionFor(name, item));
  if (!answer) return;
  const place = `/olympus/cartridges/${item.id}`;
  const reason = answer.reason;
  const force = item.state === "rejected" || item.stale;
  try {
    if (name === "delete") await api.delete(place);
    else if (name === "rollback") await api.post("/olympus/cartridges/rollback", { domain: item.domain, reason });
    else await api.post(`${place}/${name}`, name === "promote" ? { reason, force } : { reason });
    toast(`${item.id}: ${{ promote: "it serves now", reject: "rejected", retire: "retired", rollback: "rolled back", delete: "deleted" }[name]}.`);
  } catch (error) {
    toast(`${item.id}: ${error.message}`, "bad");
  }
  await refresh();
  if (document.activeElement !== document.body) return; // the button that had the focus may be gone
  const row = [...byId("lineage-table").tBodies[0].rows].find((one) => one.dataset.key === item.id);
  (row?.querySelector("button") ?? byId("lineage-table").parentElement).focus({ preventScroll: true });
}

byId("run-cancel").addEventListener("click", async () => {
  const current = run();
  const sure = await confirmed({ title: "Cancel this run?", text: "It ends at its next step. What serves now goes on.", action: "Cancel the run", danger: true });
  if (!sure) return;
  try {
    mergeRun(await api.post(`/olympus/distillation/runs/${current.id}/cancel`));
    render();
  } catch (error) {
    toast(`It was not cancelled: ${error.message}`, "bad");
  }
});

// -- wiring ------------------------------------------------------------------------------------------------------

function openInPlace(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  const query = new URL(event.currentTarget.href).searchParams;
  go(query.get("domain"), query.get("run"));
}

function go(name, runId = null) {
  wanted = { domain: name, run: runId };
  history.pushState(null, "", domainPath(name, runId));
  if ([...byId("distil-domain").options].some((option) => option.value === name)) byId("distil-domain").value = name;
  render();
  renderFormHint();
  readMetrics().catch(quiet);
}

window.addEventListener("popstate", () => {
  wanted = readAddress();
  render();
  readMetrics().catch(quiet);
});

function mergeRun(data) {
  toldAt.set(data.id, ++tellings);
  placeRun(data);
}

function placeRun(data) {
  const place = runs.findIndex((item) => item.id === data.id);
  if (place < 0) runs.unshift(data);
  else runs[place] = data;
}

function render() {
  renderServing();
  renderForm();
  renderDomain();
}

async function readHistory() {
  const { domains: known } = await api.get("/olympus/history/domains");
  counts = new Map(known.map((item) => [item.domain, item.experiences]));
}

/** A list of runs; those that were told of one by one since it was asked for (`before`) are newer than it. */
function takeRuns(list, before) {
  const newer = runs.filter((item) => (toldAt.get(item.id) ?? 0) > before).reverse();
  runs = list;
  for (const item of newer) placeRun(item);
}

async function refresh() {
  const [number, before] = [++refreshing, tellings];
  const newest = (take) => (page) => { if (number === refreshing) take(page); };
  const results = await Promise.allSettled([
    api.get("/olympus/cartridges?deleted=true").then(newest((page) => { cartridges = page.cartridges; })),
    api.get("/olympus/distillation/schedule").then(newest((page) => { schedule = page; })),
    api.get(`/olympus/distillation/runs?limit=${RUNS}`).then(newest((page) => takeRuns(page.runs, before))),
    readHistory(),
  ]);
  const failed = results.slice(0, 3).find((result) => result.status === "rejected");
  byId("page-error").hidden = !failed;
  byId("page-error").textContent = failed ? `Not up to date: ${failed.reason.message}` : "";
  loaded ||= !failed;
  render();
  await readMetrics().catch(quiet);
}

const quiet = (error) => console.debug("cartridges:", error.message);
const renderSoon = throttle(render, 250);
const refreshSoon = throttle(refresh, 1000);
const scheduleSoon = throttle(refresh, 5000);
const metricsSoon = throttle(() => readMetrics().catch(quiet), 500);

live.on("distillation", (data) => {
  const known = runs.find((item) => item.id === data.id);
  mergeRun(data);
  renderSoon();
  if (data.id === run()?.id) metricsSoon();
  if (!known || known.state !== data.state) {
    announce(`The distillation of ${data.domain} is ${data.state}`);
    refreshSoon();
  }
});
live.on("cartridge", (data) => {
  announce(`Cartridge ${data.id} is ${data.state}${data.stale ? " and stale" : ""}`);
  refreshSoon();
});
live.on("history", scheduleSoon);
live.on("reset", () => { shown = { id: null, attempts: 0 }; });
window.addEventListener("modelstate", (event) => event.detail.stage === "ready" && !schedule.working && refreshSoon());
byId("run-twin").addEventListener("toggle", () => renderRun(run(), metrics));
wireTry(() => servingOf(domain())?.id);
keepFresh(refresh);
