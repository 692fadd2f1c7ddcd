/* The page of the audit log: who did what, with filters in the address and pages. */

import { byId, h, reconcile, replace } from "./dom.js";
import { api } from "./api.js";
import { ago, integer } from "./format.js";
import { keepFresh } from "./shell.js";

const PAGE = 25;
const READ_EVERY = 5000;
const FIELDS = { actor: "audit-actor", action: "audit-action", when: "audit-when", target: "audit-target" };
const WORDS = {
  "key.create": "made a key", "key.revoke": "revoked a key", "session.begin": "signed in", "session.end": "signed out",
  "kernel.spawn": "spawned a kernel", "kernel.proposal": "held a vote", "kernel.proposal.automatic": "looked for a new kernel", "kernel.pause": "paused a kernel", "kernel.resume": "resumed a kernel", "kernel.stop": "stopped a kernel", "kernel.delete": "deleted a kernel",
  "kernel.checkpoint": "saved a checkpoint", "kernel.checkpoint.delete": "deleted a checkpoint", "kernel.pin": "pinned a checkpoint", "kernel.unpin": "unpinned a checkpoint", "kernel.restore": "restored a checkpoint",
  "cartridge.register": "made a cartridge", "cartridge.promote": "promoted a cartridge", "cartridge.reject": "rejected a cartridge", "cartridge.retire": "retired a cartridge", "cartridge.rollback": "rolled back", "cartridge.delete": "deleted a cartridge", "cartridge.stale": "marked a cartridge as stale", "cartridge.adopt": "took up a cartridge after a crash",
  "distillation.start": "started a distillation", "distillation.cancel": "cancelled a distillation", "scheduler.run": "ran a job at once",
  "history.correct": "corrected an experience", "history.delete": "deleted experiences", "history.import": "imported experiences", "latent.forget": "forgot virtual tokens",
};
const FAMILIES = { key: "keys, all", session: "sessions, all", kernel: "kernels, all", cartridge: "cartridges, all", distillation: "distillations, all", scheduler: "the schedule", history: "the history, all", latent: "virtual tokens" };
let asked = fromAddress();
let trail = []; // where the pages before this one began
let before = null;
let nextBefore = null;
let reading = 0; // of several answers only that to the newest question is shown

function fromAddress() {
  const query = new URLSearchParams(location.search);
  return Object.fromEntries(Object.keys(FIELDS).map((name) => [name, query.get(name) ?? ""]));
}

function address() {
  const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
  return `/audit${query.size > 0 ? `?${query}` : ""}`;
}

// -- lines -------------------------------------------------------------------------------------------------------

function said(value) {
  if (Array.isArray(value)) return value.join(", ");
  return value !== null && typeof value === "object" ? JSON.stringify(value) : String(value);
}

function targetLink(entry) {
  const { action, target } = entry;
  if (action.startsWith("kernel.") && !action.endsWith(".delete") && action !== "kernel.proposal") return h("a", { href: `/kernels/${encodeURIComponent(target)}` }, target);
  if (action.startsWith("cartridge.") && entry.detail.domain) return h("a", { href: `/cartridges?domain=${encodeURIComponent(entry.detail.domain)}` }, target);
  if (action.startsWith("distillation.") && entry.detail.domain) return h("a", { href: `/cartridges?domain=${encodeURIComponent(entry.detail.domain)}&run=${encodeURIComponent(target)}` }, target);
  return h("span", {}, target);
}

function more(entry) {
  const known = Object.entries(entry.detail).filter(([, value]) => value !== null && value !== "" && value !== false && !(Array.isArray(value) && value.length === 0));
  if (known.length === 0) return null;
  const short = known.map(([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, said(value))));
  const long = known.some(([, value]) => said(value).length > 120) || known.length > 4;
  const list = h("dl", { class: "detail-list" }, short);
  return long ? h("details", { class: "detail-fold" }, h("summary", { "aria-label": `Details of line ${entry.id}` }, known.slice(0, 2).map(([name, value]) => `${name.replaceAll("_", " ")} ${said(value).slice(0, 40)}`).join(", ")), list) : list;
}

function line(entry) {
  const date = new Date(1000 * entry.at);
  return h("tr", {},
    h("th", { scope: "row" }, WORDS[entry.action] ?? entry.action, h("span", { class: "sub" }, h("code", {}, entry.action))),
    h("td", { class: "wide", "data-label": "To what" }, targetLink(entry)),
    h("td", { "data-label": "Who" }, entry.actor_name ?? entry.actor, entry.actor_name && entry.actor_name !== entry.actor ? h("span", { class: "sub" }, h("code", {}, entry.actor)) : null),
    h("td", { "data-label": "When" }, ago(entry.at), h("span", { class: "sub" }, date.toLocaleString())),
    h("td", { class: "wide", "data-label": "More" }, more(entry)));
}

// -- choices -----------------------------------------------------------------------------------------------------

function renderChoices(actors, actions) {
  const people = [["", "anybody"], ...actors.map((item) => [item.actor, item.name ?? item.actor])];
  if (asked.actor && !people.some(([value]) => value === asked.actor)) people.push([asked.actor, asked.actor]);
  replace(byId("audit-actor"), people, () => people.map(([value, label]) => h("option", { value }, label)));
  byId("audit-actor").value = asked.actor;
  const families = [...new Set(actions.map((item) => item.action.split(".")[0]))];
  const single = actions.map((item) => item.action);
  const known = ["", ...families, ...single];
  const extra = asked.action && !known.includes(asked.action) ? [asked.action] : [];
  replace(byId("audit-action"), [families, single, extra], () => [h("option", { value: "" }, "anything"), ...[...families, ...extra].map((name) => h("option", { value: name }, FAMILIES[name] ?? name)), ...single.filter((name) => name.includes(".")).map((name) => h("option", { value: name }, WORDS[name] ?? name))]);
  byId("audit-action").value = asked.action;
}

function render({ entries, actors, actions }) {
  renderChoices(actors, actions);
  const body = byId("audit-table").tBodies[0];
  byId("audit-table").tHead.hidden = entries.length === 0;
  byId("audit-newer").disabled = trail.length === 0;
  byId("audit-older").disabled = nextBefore === null;
  byId("audit-paging").hidden = trail.length === 0 && nextBefore === null;
  const from = trail.length * PAGE;
  byId("audit-count").textContent = entries.length === 0 ? "" : `${integer(from + 1)} to ${integer(from + entries.length)}, newest first`;
  if (entries.length === 0) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: 5, class: "empty wide" }, trail.length > 0 ? "No older ones." : address() === "/audit" ? "Nothing was changed yet." : "No line fits.")));
    return;
  }
  reconcile(body, entries, (entry) => entry.id, line);
}

// -- wiring ------------------------------------------------------------------------------------------------------

async function read() {
  const number = ++reading;
  const query = new URLSearchParams({ limit: PAGE });
  for (const name of ["actor", "action", "target"]) if (asked[name]) query.set(name, asked[name]);
  if (Number(asked.when) > 0) query.set("since", Math.floor(Date.now() / 1000 - Number(asked.when)));
  if (before !== null) query.set("before", before);
  try {
    const page = await api.get(`/olympus/audit?${query}`);
    if (number !== reading) return;
    nextBefore = page.next_before;
    byId("page-error").hidden = true;
    render(page);
  } catch (error) {
    if (number !== reading) return;
    byId("page-error").hidden = false;
    byId("page-error").textContent = error.status === 403 ? "The audit log is shown to administrators only: sign in with a key that has the scope admin." : `Not up to date: ${error.message}`;
  }
}

function fill() {
  byId("audit-when").value = asked.when;
  byId("audit-target").value = asked.target;
}

function ask() {
  asked = Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, byId(id).value.trim()]));
  [trail, before] = [[], null];
  history.pushState(null, "", address());
  return read();
}

byId("audit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
for (const id of ["audit-actor", "audit-action", "audit-when"]) byId(id).addEventListener("change", ask);
byId("audit-older").addEventListener("click", () => turn(() => {
  trail.push(before);
  before = nextBefore;
}));
byId("audit-newer").addEventListener("click", () => turn(() => { before = trail.pop(); }));

async function turn(change) {
  change();
  await read();
  byId("audit-table").parentElement.focus({ preventScroll: true });
  byId("lines-title").scrollIntoView({ block: "nearest" });
}

window.addEventListener("popstate", () => {
  asked = fromAddress();
  [trail, before] = [[], null];
  fill();
  read();
});

fill();
keepFresh(read);
setInterval(() => !document.hidden && trail.length === 0 && !byId("audit-table").querySelector("details[open]") && read(), READ_EVERY);
