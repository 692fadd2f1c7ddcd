/* How cartridges look: the table of domains, the lineage of one, and what can be done with each. */

import { h } from "./dom.js";
import { ago, bytes, decimal, integer, isNumber, missing, percent } from "./format.js";
import { stateBadge } from "./kernel_view.js";

// The mark of each state, by the kernels' shapes.
const MARKS = {
  serving: "converged", candidate: "queued", retired: "stopped", rejected: "failed", deleted: "stopped",
  queued: "queued", running: "training", cancelling: "waiting", promoted: "settled", skipped: "paused", failed: "failed", cancelled: "stopped",
};
const PAGE = 16; // slots of a page of Tokasaurus

/** The mark and the word for the state of a cartridge or a run. */
export function badge(state, text = state) {
  return stateBadge(MARKS[state] ?? "queued", text);
}

export function domainPath(domain, run = null) {
  return `/cartridges?domain=${encodeURIComponent(domain)}${run ? `&run=${encodeURIComponent(run)}` : ""}`;
}

export function staleMark() {
  return h("span", { class: "stale", title: "Something that it was trained on was corrected or deleted since" }, "stale");
}

/** The mean of an arm on a metric, as {mean, low, high, rows}, or null. */
export function armOf(cartridge, arm, metric) {
  return cartridge.metrics?.evaluation?.arms?.[arm]?.[metric] ?? null;
}

/** One row of the table of domains. `item`: {domain, experiences, serving, candidates, run}. */
export function servingRow(item, open) {
  const { domain, serving, run } = item;
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: domainPath(domain), onclick: open, "aria-current": item.selected ? "true" : null }, domain),
      h("span", { class: "sub" }, !isNumber(item.experiences) ? "" : item.experiences === 0 ? "no experience left" : `${integer(item.experiences)} ${item.experiences === 1 ? "experience" : "experiences"}`)),
    h("td", { class: "wide", "data-label": "Serves" }, serving ? [badge("serving", serving.id), serving.stale ? [" ", staleMark()] : null]
      : h("span", { class: "missing" }, item.candidates > 0 ? `nothing; ${integer(item.candidates)} waiting to be decided` : "nothing yet")),
    h("td", { class: "num", "data-label": "Slots" }, serving ? integer(serving.slots) : "–"),
    h("td", { class: "num", "data-label": "Size" }, serving ? bytes(serving.bytes) : "–"),
    h("td", { "data-label": "Newest run" }, run ? [badge(run.state, runText(run)), h("span", { class: "sub" }, ago(run.created_at))] : h("span", { class: "missing" }, "none yet")));
}

function runText(run) {
  const share = run.progress?.fraction;
  return run.state === "running" && isNumber(share) ? `running, ${Math.floor(100 * share)} %` : run.state;
}

/** Only what a row of the lineage shows. */
export function lineageItem(cartridge, all) {
  const rollbackTo = cartridge.replaced_id && all.some((item) => item.id === cartridge.replaced_id && item.state !== "deleted") ? cartridge.replaced_id : null;
  return {
    id: cartridge.id, state: cartridge.state, reason: cartridge.state_reason, stale: cartridge.stale, domain: cartridge.domain,
    parent: cartridge.parent_id, replaced: cartridge.replaced_id, run: cartridge.run_id, init: cartridge.manifest?.init?.type ?? null, rollbackTo,
    experiences: cartridge.experiences, exact: armOf(cartridge, "cartridge", "exact"), nats: armOf(cartridge, "cartridge", "nll"),
    slots: cartridge.slots, bytes: cartridge.bytes, frozen: cartridge.manifest?.frozen ?? 0, created_at: cartridge.created_at,
  };
}

/** One row of the lineage. `run(action, item)` does what a button says; `open` follows a link to a run. */
export function lineageRow(item, run, open) {
  return h("tr", { dataset: { state: item.state } },
    h("th", { scope: "row" }, item.id, h("span", { class: "sub" }, ago(item.created_at))),
    h("td", { class: "wide", "data-label": "State" }, badge(item.state), item.stale && item.state !== "deleted" ? [" ", staleMark()] : null, item.reason ? h("span", { class: "sub reason", title: item.reason }, item.reason) : null),
    h("td", { class: "wide", "data-label": "Comes from" }, origin(item, open)),
    h("td", { class: "num", "data-label": "Learned from" }, item.experiences > 0 ? h("a", { href: `/memory?cartridge=${item.id}`, "aria-label": `${integer(item.experiences)} experiences: what ${item.id} learned from` }, integer(item.experiences)) : missing(item.state === "deleted" ? "its list was deleted with it" : "it was not trained on this history", "not known")),
    h("td", { class: "num", "data-label": "Right answers" }, item.exact ? percent(item.exact.mean) : missing("the gate asked no question with a known answer", "not asked")),
    h("td", { class: "num", "data-label": "Nats" }, item.nats ? decimal(item.nats.mean, 2) : missing("the gate did not measure it", "not asked")),
    h("td", { class: "num", "data-label": "Slots" }, integer(item.slots)),
    h("td", { class: "num", "data-label": "Size" }, bytes(item.bytes)),
    h("td", { class: "wide" }, item.state === "deleted" ? h("span", { class: "missing" }, "its numbers are gone") : actions(item, run)));
}

function origin(item, open) {
  const parts = [];
  if (item.run) parts.push(h("a", { href: domainPath(item.domain, item.run), onclick: open }, item.run));
  else parts.push(item.init === "import" ? "imported file" : "made by hand");
  if (item.parent) parts.push(h("span", { class: "sub" }, `began as ${item.parent}`));
  if (item.replaced) parts.push(h("span", { class: "sub" }, `replaced ${item.replaced}`));
  return parts;
}

const OFFERED = {
  candidate: ["promote", "reject", "delete"],
  serving: ["rollback", "retire"],
  retired: ["promote", "delete"],
  rejected: ["promote", "delete"],
};
const LABELS = { promote: "Promote", reject: "Reject", retire: "Retire", rollback: "Roll back", delete: "Delete" };

function actions(item, run) {
  const offered = (OFFERED[item.state] ?? []).filter((name) => name !== "rollback" || item.rollbackTo);
  return h("div", { class: "row-actions" },
    offered.map((name) => h("button", { class: "button", type: "button", dataset: { size: "small", kind: name === "delete" ? "danger" : "" }, "aria-label": `${LABELS[name]} ${item.id}`, onclick: () => run(name, item) }, LABELS[name])),
    exports(item));
}

function exports(item) {
  const link = (format, label) => h("li", {}, h("a", { href: `/olympus/cartridges/${item.id}/export?format=${format}`, download: "" }, label));
  const pages = item.slots % PAGE === 0 && item.frozen >= 1;
  return h("details", { class: "exports" }, h("summary", { "aria-label": `Export ${item.id}` }, "Export"),
    h("ul", {}, link("native", "ours"), link("peft", "PEFT"),
      pages ? link("tokasaurus", "Tokasaurus") : h("li", { class: "hint" }, `Not for Tokasaurus: it needs a multiple of ${PAGE} slots, the first of them frozen.`)));
}

const FORCED = "It was rejected by the gate or by a person. Promoting it goes against that.";

/** What is asked before an action, for `dialog.confirmed`. */
export function questionFor(name, item) {
  const stale = "It is stale: something that it was trained on was corrected or deleted since, and it may still say it.";
  return {
    promote: {
      title: `Let ${item.id} serve?`, action: "Promote", reason: "optional",
      text: `From then on it serves ${item.domain}. What serves now is retired in the same moment and can be rolled back to.`,
      notes: [item.state === "rejected" ? FORCED : null, item.stale ? stale : null].filter(Boolean),
    },
    reject: { title: `Reject ${item.id}?`, action: "Reject", danger: true, reason: "required", text: "It will serve nobody. What serves now goes on." },
    retire: { title: `Retire ${item.id}?`, action: "Retire", danger: true, reason: "optional", text: `Nothing takes its place: ${item.domain} is then answered without a cartridge until another one is promoted.` },
    rollback: { title: "Roll back?", action: "Roll back", reason: "optional", text: `${item.rollbackTo} serves ${item.domain} again, and ${item.id} is retired. If that one is stale, it is passed over for the one before.` },
    delete: { title: `Delete ${item.id}?`, action: "Delete", danger: true, text: "Its numbers are removed from this server for good. The line in the lineage stays, and its name is not given again." },
  }[name];
}
