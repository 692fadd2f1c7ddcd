/* The page of the memory: search or browse on the left, one experience on the right, files below. */

import { byId, h, reconcile, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { integer } from "./format.js";
import { keepFresh, live, throttle } from "./shell.js";
import { experienceLine, showExperience, showNothing } from "./experience_view.js";
import { renderExport, wireFiles } from "./memory_files.js";
import { renderForget, wireForget } from "./memory_forget.js";

const PAGE = 15;
const FOUND = 30;
const FIELDS = { q: "search-q", domain: "search-domain", session: "search-session", judged: "search-judged", cartridge: "search-cartridge" };
let domains = [];
let sessions = [];
let cartridges = [];
let items = [];
let nextBefore = null;
let trail = []; // where the pages before this one began
let before = null;
let chosen = null;
let asked = { q: "" }; // what the list answers
let questions = 0; // of the reader
let reading = 0; // of several answers only that to the newest question is shown

// -- the list ----------------------------------------------------------------------------------------------------

function fields() {
  return Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value.trim()]));
}

function address() {
  const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
  if (chosen !== null) query.set("id", chosen);
  const text = query.toString();
  return `/memory${text ? `?${text}` : ""}`;
}

function notice(text) {
  byId("browse-notice").hidden = text === "";
  byId("browse-notice").textContent = text;
}

/** Ask for what `asked` says; a search that cannot be answered becomes browsing, with the reason above it. */
async function read() {
  const number = ++reading;
  const current = () => number === reading;
  notice("");
  byId("newest").hidden = true;
  for (const name of ["q", "domain", "session", "judged"]) byId(FIELDS[name]).disabled = Boolean(asked.cartridge);
  if (asked.cartridge) return taught(current);
  if (asked.q) {
    try {
      await search(current);
      return;
    } catch (error) {
      if (!current()) return;
      if (error.code !== "memory_disabled") throw error;
      notice("Search is switched off on this server: memory.episodic.enabled is false. Below is the history as it came, newest first.");
    }
  } else if (asked.judged) notice("To see only what was judged good, ask a question, too.");
  await browse(current);
}

async function search(current) {
  const query = new URLSearchParams({ q: asked.q, limit: FOUND });
  if (asked.domain) query.set("domain", asked.domain);
  if (asked.session) query.set("session", asked.session);
  if (asked.judged) query.set("min_score", asked.judged);
  const told = await api.get(`/olympus/memory/search?${query}`);
  if (!current()) return;
  items = told.results;
  nextBefore = null;
  if (!told.complete) notice("Older experiences are still being read, so more may be found in a moment.");
  const how = told.meaning ? "by words and by meaning" : "by words alone";
  byId("browse-count").textContent = `${integer(items.length)} found, ${how}`;
  render("Nothing fits. Try other words, or another domain.");
}

/** What a cartridge was trained on; the other filters do not apply. */
async function taught(current) {
  const query = new URLSearchParams({ limit: PAGE });
  if (before !== null) query.set("before", before);
  const page = await api.get(`/olympus/cartridges/${encodeURIComponent(asked.cartridge)}/experiences?${query}`);
  if (!current()) return;
  items = page.experiences;
  nextBefore = page.next_before;
  const [from, left] = [trail.length * PAGE, page.total - page.forgotten];
  byId("browse-count").textContent = items.length === 0 ? "" : `${integer(from + 1)} to ${integer(from + items.length)} of ${integer(left)} that it was trained on`;
  if (page.forgotten > 0) notice(`${asked.cartridge} was trained on ${integer(page.total)} experiences, and ${integer(page.forgotten)} of them ${page.forgotten === 1 ? "is" : "are"} forgotten since: it is stale.`);
  render(trail.length > 0 ? "No older ones." : page.total === 0 ? "It was not trained on this history, so nothing is known of it." : "All that it was trained on is forgotten.");
}

async function browse(current) {
  const query = new URLSearchParams({ limit: PAGE });
  if (asked.domain) query.set("domain", asked.domain);
  if (asked.session) query.set("session", asked.session);
  if (before !== null) query.set("before", before);
  const page = await api.get(`/olympus/history?${query}`);
  if (!current()) return;
  items = page.experiences;
  nextBefore = page.next_before;
  const all = domains.filter((item) => !asked.domain || item.domain === asked.domain).reduce((sum, item) => sum + item.experiences, 0);
  const from = trail.length * PAGE;
  byId("browse-count").textContent = items.length === 0 ? "" : `${integer(from + 1)} to ${integer(from + items.length)}${asked.session ? "" : ` of ${integer(all)}`}, newest first`;
  render(trail.length > 0 ? "No older ones." : asked.domain || asked.session ? "Nothing was lived through there." : "Nothing yet. The first chat becomes experience number one; a history can also be imported below.");
}

function render(empty) {
  const list = byId("experiences");
  byId("paging").hidden = Boolean(asked.q) && trail.length === 0 && nextBefore === null;
  byId("newer").disabled = trail.length === 0;
  byId("older").disabled = nextBefore === null;
  if (items.length === 0) {
    list.replaceChildren(h("li", { class: "empty" }, empty));
    return;
  }
  reconcile(list, items.map((item) => ({ ...item, chosen: item.id === chosen })), (item) => item.id, (item) => experienceLine(item, (id) => open(id, true)));
}

function complain(error) {
  byId("browse-count").textContent = "";
  notice(`Not up to date: ${error.message}`);
}

async function ask(push = true) {
  questions += 1;
  asked = fields();
  [trail, before] = [[], null];
  if (push) history.pushState(null, "", address());
  await read().catch(complain);
}

byId("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
for (const name of ["domain", "session", "judged", "cartridge"]) {
  byId(FIELDS[name]).addEventListener("change", () => {
    if (name === "domain") renderSessions();
    ask();
  });
}
byId("search-q").addEventListener("search", () => byId("search-q").value === "" && asked.q && ask()); // its cross was pressed
byId("older").addEventListener("click", () => turn(() => {
  trail.push(before);
  before = nextBefore;
}));
byId("newer").addEventListener("click", () => turn(() => { before = trail.pop(); }));
byId("newest").addEventListener("click", () => turn(() => { [trail, before] = [[], null]; }));

async function turn(change) {
  change();
  await read().catch(complain);
  byId("experiences").querySelector("button")?.focus({ preventScroll: true });
  byId("browse-title").scrollIntoView({ block: "nearest" });
}

// -- one experience ----------------------------------------------------------------------------------------------

async function open(id, focus) {
  chosen = id;
  history.replaceState(null, "", address());
  if (items.length > 0) render("");
  try {
    await showExperience(id, changed);
  } catch (error) {
    showNothing(error.status === 404 ? `#${id} does not exist, or it was deleted.` : `It cannot be shown: ${error.message}`);
  }
  if (!focus) return;
  byId("inspector").focus({ preventScroll: true });
  if (window.matchMedia("(max-width: 64rem)").matches) byId("inspector").scrollIntoView();
}

/** After a judgement, a correction (`id` is the new one) or a deletion (null). */
async function changed(id) {
  chosen = id;
  history.replaceState(null, "", address());
  if (id === null) showNothing("It was deleted. Choose another one from the list.");
  await refresh();
  if (id === null) byId("inspector").focus({ preventScroll: true });
  else await open(id, true);
}

// -- what can be chosen ------------------------------------------------------------------------------------------

function renderDomains(wanted) {
  const select = byId("search-domain");
  const value = wanted ?? select.value;
  replace(select, domains, () => [h("option", { value: "" }, "all"), ...domains.map((item) => h("option", { value: item.domain }, `${item.domain} (${integer(item.experiences)})`))]);
  if (domains.some((item) => item.domain === value)) select.value = value;
  renderExport(domains.map((item) => item.domain));
}

function renderCartridges(wanted) {
  const select = byId("search-cartridge");
  const value = wanted ?? select.value;
  const known = cartridges.map((item) => [item.id, item.state]);
  if (value && !known.some(([id]) => id === value)) known.unshift([value, "not there any more"]);
  replace(select, known, () => [h("option", { value: "" }, "any or none"), ...known.map(([id, state]) => h("option", { value: id }, `${id} (${state})`))]);
  select.value = value;
}

function renderSessions(wanted) {
  const select = byId("search-session");
  const value = wanted ?? select.value;
  const domain = byId("search-domain").value;
  const fitting = sessions.filter((item) => !domain || item.domain === domain);
  replace(select, fitting, () => [h("option", { value: "" }, "all"), ...fitting.map((item) => h("option", { value: item.id }, (item.title || item.id).slice(0, 60)))]);
  if (fitting.some((item) => item.id === value)) select.value = value;
}

async function readStatus() {
  const line = byId("memory-status");
  try {
    const status = await api.get("/olympus/memory/status");
    const { embedding } = status;
    const meaning = { ready: `${integer(status.vectors)} can be found by meaning, too`, off: "found by words alone, since embeddings are switched off", failed: `found by words alone: ${embedding.reason ?? embedding.detail ?? "the embedding failed"}` }[embedding.state] ?? "meaning follows when the embedding is ready";
    line.textContent = `${integer(status.entries)} ${status.entries === 1 ? "experience" : "experiences"} in the search; ${meaning}${status.pending && embedding.state !== "off" ? `, ${integer(status.pending)} waiting for it` : ""}.`;
  } catch (error) {
    line.textContent = error.code === "memory_disabled" ? "The search is switched off on this server (memory.episodic.enabled is false). Browsing works all the same." : `The search cannot be reached: ${error.message}`;
  }
}

async function readChoices(wanted = {}) {
  const [found, talks] = await Promise.all([api.get("/olympus/history/domains"), api.get("/olympus/sessions?limit=500")]);
  domains = found.domains;
  sessions = talks.sessions;
  cartridges = await api.get("/olympus/cartridges").then((told) => told.cartridges, () => []); // this key may not see them
  renderDomains(wanted.domain);
  renderSessions(wanted.session);
  renderCartridges(wanted.cartridge);
  renderForget(domains, sessions);
}

// -- wiring ------------------------------------------------------------------------------------------------------

async function refresh() {
  await readChoices().catch(complain);
  await Promise.all([read().catch(complain), readStatus()]);
}

async function fromAddress() {
  const query = new URLSearchParams(location.search);
  const begun = questions;
  byId("search-q").value = query.get("q") ?? "";
  byId("search-judged").value = query.get("judged") ?? "";
  await readChoices({ domain: query.get("domain") ?? "", session: query.get("session") ?? "", cartridge: query.get("cartridge") ?? "" });
  if (questions !== begun) return readStatus(); // the reader was quicker and has asked something else
  chosen = Number(query.get("id")) || null;
  asked = fields();
  [trail, before] = [[], null];
  await Promise.all([read(), readStatus(), chosen === null ? null : open(chosen, false)]);
}

const newer = throttle(() => {
  readStatus();
  if (asked.q || trail.length > 0) byId("newest").hidden = Boolean(asked.q);
  else refresh();
}, 1500);

live.on("history", newer);
live.on("cartridge", (data) => data.stale && toast(`${data.id} is stale now: it learned from something that is gone.`));
window.addEventListener("popstate", () => fromAddress().catch(complain));
wireFiles(refresh);
wireForget(refresh);
let begun = false;
keepFresh(() => {
  if (begun) return refresh();
  begun = true;
  return fromAddress().catch(complain);
});
