/* The page of the scheduler: jobs with their clocks, what each domain waits for, runs and how they ended. */

import { announce, byId, h, reconcile, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { ago, duration, integer, isNumber } from "./format.js";
import { stateBadge } from "./kernel_view.js";
import { badge, domainPath } from "./cartridge_view.js";
import { OPEN, triggerItem } from "./triggers.js";
import { sentence } from "./convergence.js";
import { confirmed } from "./dialog.js";
import { keepFresh, live, throttle } from "./shell.js";

const RUNS = 15;
const OUTCOMES = 5;
const READ_EVERY = 10_000;
let jobs = [];
let schedule = { domains: [], automatic: false, working: false };
let runs = [];
let offset = 0; // the server's clock minus this one's, in seconds

const RESULTS = { done: ["settled", "done"], nothing: ["ok", "nothing to do"], failed: ["failed", "failed"], missed: ["stalled", "left out"] };

// -- jobs --------------------------------------------------------------------------------------------------------

const every = (seconds) => ({ 1: "every second", 60: "every minute", 3600: "every hour" })[seconds] ?? `every ${duration(seconds)}`;

/** When a job comes next, as a sentence. */
function clock(job) {
  if (job.off) return `Does not run by itself: ${job.off}.`;
  if (job.at_work) return "At work now.";
  if (!isNumber(job.next_at)) return "Begins when the language model is ready.";
  const left = job.next_at - (Date.now() / 1000 + offset);
  return left > 0 ? `Next in ${duration(Math.max(1, left))}.` : "Waits for new experiences.";
}

const clockLine = (job) => `${clock(job)} It is called ${every(job.every_seconds)}.`;

function outcomeLine(outcome) {
  const [mark, word] = RESULTS[outcome.result];
  const by = outcome.by === "schedule" ? "by the clock" : outcome.by === "local" ? "by hand, on this machine" : `by hand, key ${outcome.by}`;
  return h("li", {}, stateBadge(mark, word), h("span", { class: "outcome-told" }, outcome.told ? sentence(outcome.told) : "", h("span", { class: "hint" }, `${outcome.told ? " " : ""}${by}${outcome.times > 1 ? `, ${integer(outcome.times)} times in a row` : ""}, ${duration(outcome.seconds)}`)), ago(outcome.began_at));
}

function jobCard(job) {
  return h("article", { class: "panel job", "aria-labelledby": `job-${job.id}` },
    h("div", { class: "panel-head" }, h("h3", { class: "panel-title", id: `job-${job.id}` }, job.title),
      h("button", { class: "button", type: "button", disabled: job.at_work, "aria-label": `Run now: ${job.title}`, onclick: () => runNow(job) }, "Run now")),
    h("p", {}, job.about),
    h("p", { class: "hint job-clock", dataset: { job: job.id } }, clockLine(job)),
    job.outcomes.length === 0 ? h("p", { class: "empty" }, "It was not called since the start.") : h("ol", { class: "outcomes", "aria-label": `Outcomes of: ${job.title}` }, job.outcomes.slice(0, OUTCOMES).map(outcomeLine)));
}

function renderJobs() {
  const focused = document.activeElement?.closest?.(".job")?.dataset.key;
  reconcile(byId("jobs"), jobs, (job) => job.id, jobCard);
  if (focused && !document.activeElement?.closest?.(".job")) [...byId("jobs").children].find((card) => card.dataset.key === focused)?.querySelector("button").focus({ preventScroll: true });
  tick();
}

function tick() {
  for (const line of byId("jobs").querySelectorAll(".job-clock")) {
    const job = jobs.find((item) => item.id === line.dataset.job);
    const text = job ? clockLine(job) : "";
    if (line.textContent !== text) line.textContent = text;
  }
}

async function runNow(job) {
  try {
    const { outcome } = await api.post(`/olympus/scheduler/${job.id}/run`);
    const words = { done: sentence(outcome.told), nothing: "Nothing had to be done.", failed: `It failed: ${outcome.told}`, missed: "It was left out." };
    toast(`${job.title}: ${words[outcome.result]}`, outcome.result === "failed" ? "bad" : "good");
    announce(words[outcome.result]);
  } catch (error) {
    toast(`${job.title}: ${error.message}`, "bad");
  }
  await refresh();
}

// -- domains -----------------------------------------------------------------------------------------------------

function domainCard({ outlook, run, automatic, working }) {
  const open = run !== null && OPEN.includes(run.state);
  const verdict = open ? `A run is under way: ${run.progress.stage ?? run.state}${isNumber(run.progress.fraction) ? `, ${Math.round(100 * run.progress.fraction)} %` : ""}.`
    : outlook.would_start ? `${outlook.would_start} starts a run at the next look: ${outlook.reason}` : outlook.reason;
  return h("article", { class: "domain", "aria-labelledby": `domain-${outlook.domain}` },
    h("div", { class: "domain-line" },
      h("h3", { id: `domain-${outlook.domain}` }, h("a", { href: domainPath(outlook.domain) }, outlook.domain)),
      run ? badge(run.state, open ? run.state : `last: ${run.state}`) : h("span", { class: "hint" }, "never distilled"),
      h("button", { class: "button", type: "button", dataset: { size: "small" }, disabled: open || !working, "aria-label": `Distil ${outlook.domain} now`, onclick: () => distil(outlook.domain) }, "Distil now")),
    h("p", { class: "hint" }, sentence(verdict), automatic || outlook.triggers.length === 0 ? "" : " Triggers start nothing here: distillation.automatic is false."),
    h("ul", { class: "conditions" }, outlook.triggers.map(triggerItem)));
}

function renderDomains() {
  const items = schedule.domains.map((outlook) => ({ outlook, run: runs.find((item) => item.domain === outlook.domain) ?? null, automatic: schedule.automatic, working: schedule.working }));
  byId("domains-note").textContent = items.length === 0 ? "" : `${integer(items.length)} ${items.length === 1 ? "domain" : "domains"}`;
  if (items.length === 0) {
    byId("domains").replaceChildren(h("p", { class: "empty" }, "Nothing has been lived through yet. The first chat makes the first domain."));
    return;
  }
  reconcile(byId("domains"), items, (item) => item.outlook.domain, domainCard);
}

async function distil(domain) {
  const sure = await confirmed({ title: `Distil ${domain} now?`, action: "Distil", text: "A run with the domain's preset works in the background and gives way to chats. What serves now goes on until a candidate passes the gate." });
  if (!sure) return;
  try {
    const made = await api.post("/olympus/distillation/runs", { domain });
    toast(`${made.id} waits for its turn.`);
  } catch (error) {
    toast(`It was not started: ${error.message}`, "bad");
  }
  await refresh();
}

// -- outcomes ----------------------------------------------------------------------------------------------------

function outcomeRow(run) {
  const why = run.error ?? run.progress.verdict?.reason ?? (OPEN.includes(run.state) ? run.progress.detail : "");
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: domainPath(run.domain, run.id) }, run.domain)),
    h("td", { class: "wide", "data-label": "Outcome" }, badge(run.state), why ? h("span", { class: "sub reason", title: why }, sentence(why)) : null),
    h("td", { "data-label": "Started by" }, run.trigger === "manual" ? "hand" : `the trigger ${run.trigger}`),
    h("td", { "data-label": "When" }, ago(run.created_at)),
    h("td", { class: "num", "data-label": "Took" }, isNumber(run.finished_at) ? duration(run.finished_at - run.created_at) : "–"),
    h("td", { "data-label": "Run" }, h("code", {}, run.id)));
}

function renderOutcomes() {
  const body = byId("outcomes-table").tBodies[0];
  byId("outcomes-table").tHead.hidden = runs.length === 0;
  byId("outcomes-note").textContent = runs.length === 0 ? "" : "newest first";
  if (runs.length === 0) {
    replace(body, "none", () => h("tr", {}, h("td", { colspan: 6, class: "empty wide" }, "No run yet.")));
    return;
  }
  delete body.dataset.signature;
  const shown = runs.slice(0, RUNS).map(({ id, domain, state, trigger, created_at, finished_at, error, progress }) => ({ id, domain, state, trigger, created_at, finished_at, error, progress: { verdict: progress.verdict && { reason: progress.verdict.reason }, detail: progress.detail } }));
  reconcile(body, shown, (run) => run.id, outcomeRow);
}

// -- wiring ------------------------------------------------------------------------------------------------------

async function refresh() {
  const results = await Promise.allSettled([
    api.get("/olympus/scheduler").then((told) => {
      jobs = told.jobs;
      offset = told.now - Date.now() / 1000;
    }),
    api.get("/olympus/distillation/schedule").then((told) => { schedule = told; }),
    api.get("/olympus/distillation/runs?limit=100").then((told) => { runs = told.runs; }),
  ]);
  const failed = results.find((result) => result.status === "rejected");
  byId("page-error").hidden = !failed;
  byId("page-error").textContent = failed ? `Not all of it can be shown: ${failed.reason.message}` : "";
  renderJobs();
  renderDomains();
  renderOutcomes();
}

const refreshSoon = throttle(refresh, 1000);
live.on("distillation", refreshSoon);
live.on("history", throttle(refresh, 5000));
window.addEventListener("modelstate", (event) => event.detail.stage === "ready" && !schedule.working && refreshSoon());
keepFresh(refresh);
setInterval(tick, 1000);
setInterval(() => !document.hidden && live.state === "live" && refreshSoon(), READ_EVERY);
