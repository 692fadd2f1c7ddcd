/* The chat page: conversations on the left, one conversation, and the composer. */

import { announce, byId, h, reconcile, toast } from "./dom.js";
import { api } from "./api.js";
import { clearAttachments } from "./attachments.js";
import { chosenDomain, comparing, invalidField, requestBodies, wireOptions, without } from "./chat_options.js";
import { complete } from "./completion.js";
import { confirmed } from "./dialog.js";
import { ago, integer } from "./format.js";
import { PairTurn } from "./pair_turn.js";
import { live, readStatus, throttle } from "./shell.js";
import { measurements, Turn } from "./turns.js";

const HISTORY_LIMIT = 200;
const NEAR_BOTTOM = 80;

const transcript = byId("transcript");
const prompt = byId("prompt");
const emptyBox = byId("chat-empty");
let session = null;
let turns = [];
let running = null; // the AbortController of the answer being written
let defaults = { domain: "general", newestId: null };
let model = null;

// -- what the next message becomes -------------------------------------------------------------------------------

function showBecomes() {
  const next = defaults.newestId === null ? "" : ` #${defaults.newestId + 1}`;
  const also = comparing() ? ` Asked twice: with ${without()}, and without.` : "";
  byId("becomes").textContent = `This exchange becomes experience${next} in domain ${chosenDomain(defaults.domain)}.${also}`;
}

// -- conversations -----------------------------------------------------------------------------------------------

function newSessionId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID() is missing on plain http
  return `chat-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

async function readSessions() {
  const { sessions } = await api.get("/olympus/sessions");
  const list = byId("sessions");
  if (sessions.length === 0) {
    list.replaceChildren(h("li", { class: "hint" }, "None yet."));
    return;
  }
  const items = sessions.map((item) => ({ ...item, current: item.id === session }));
  reconcile(list, items, (item) => item.id, (item) => h("li", {},
    h("a", { href: `/chat?session=${encodeURIComponent(item.id)}`, "aria-current": item.current ? "true" : null, onclick: openInPlace },
      h("span", {}, item.title || "Untitled"), h("small", {}, ago(item.updated_at), `, ${item.domain}`))));
}

function openInPlace(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  open(new URL(event.currentTarget.href).searchParams.get("session"), true);
}

function setTitle(text) {
  byId("chat-title").textContent = text;
  document.title = `${text} · Olympus`;
}

function clear() {
  running?.abort();
  turns = [];
  transcript.replaceChildren(emptyBox);
  emptyBox.hidden = false;
  byId("forget-chat").hidden = true;
  clearAttachments();
  setTitle("New chat");
}

/** Delete the conversation with all that became of it. */
async function forget() {
  const sure = await confirmed({
    title: "Delete this conversation?", action: "Delete", danger: true,
    text: "Its exchanges leave the history, and with them the virtual tokens that it keeps. Cartridges that learned from it become stale. This cannot be taken back.",
  });
  if (!sure) return;
  try {
    const { deleted } = await api.delete(`/olympus/history?session=${encodeURIComponent(session)}`);
    toast(`${integer(deleted)} ${deleted === 1 ? "experience was" : "experiences were"} deleted.`);
    await open(null, true);
  } catch (error) {
    toast(`It was not deleted: ${error.message}`, "bad");
  }
}

async function open(id, push) {
  clear();
  session = id ?? newSessionId();
  if (push) history.pushState(null, "", id ? `/chat?session=${encodeURIComponent(id)}` : "/chat");
  if (window.matchMedia("(max-width: 56rem)").matches) byId("sessions-box").open = false;
  readSessions().catch((error) => console.debug("sessions:", error.message));
  if (id) await load(id);
  prompt.focus({ preventScroll: true });
}

async function load(id) {
  const wanted = session;
  const { experiences } = await api.get(`/olympus/history?session=${encodeURIComponent(id)}&limit=${HISTORY_LIMIT}`);
  if (session !== wanted) return; // the reader has moved on
  const inOrder = [...experiences].reverse();
  if (inOrder.length === 0) return;
  emptyBox.hidden = true;
  byId("forget-chat").hidden = false;
  setTitle(inOrder[0].observation.split("\n")[0].slice(0, 80));
  for (const item of inOrder) {
    addTurn(new Turn("user", item.observation));
    const answer = addTurn(new Turn("assistant", item.action));
    const tokens = item.meta?.completion_tokens;
    answer.finish(tokens ? [`${tokens} tokens`] : [], { id: item.id, domain: item.domain, score: item.score });
  }
  offerAgain();
  scrollDown(true);
}

// -- the conversation --------------------------------------------------------------------------------------------

function addTurn(turn) {
  turns.push(turn);
  transcript.append(turn.element);
  return turn;
}

function scrollDown(force = false) {
  const gap = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight;
  if (force || gap < NEAR_BOTTOM) transcript.scrollTop = transcript.scrollHeight;
}

/** Only the last answer can be asked for again. */
function offerAgain() {
  for (const turn of turns) turn.offerAgain(turn === turns.at(-1) && turn.role === "assistant" ? again : null);
}

function again() {
  if (running) return;
  const last = turns.pop();
  last.element.remove();
  answer();
}

/** Ask with what the conversation holds; with a comparison twice, one after the other. */
async function answer() {
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  const bodies = requestBodies(messages, { session, domain: chosenDomain(defaults.domain), model: model?.name });
  const turn = addTurn(bodies.length > 1 ? new PairTurn(without()) : new Turn("assistant"));
  const sides = turn.sides ?? [turn];
  setRunning(new AbortController());
  try {
    for (const [index, side] of sides.entries()) {
      const result = await write(side, bodies[index]);
      if (result.workspace) turn.showInside(result.workspace, result.trace);
      turn.measured?.(index, result);
    }
    announce(`Answer finished: ${turn.text.slice(0, 300)}`);
  } catch (error) {
    settleFailure(turn, sides, error);
  } finally {
    setRunning(null);
    offerAgain();
    showBecomes();
    scrollDown();
    readSessions().catch((error) => console.debug("sessions:", error.message));
  }
}

/** One streamed answer into `turn`; resolves to what `complete` measured. */
async function write(turn, body) {
  turn.busy = true;
  scrollDown(true);
  const result = await complete(body, { signal: running.signal, onText: (delta) => turn.append(delta, scrollDown) });
  const experience = result.experienceId === null ? null : { id: result.experienceId, domain: result.domain, score: null };
  turn.finish([...measurements(result), body.store === false ? "not written down" : null].filter(Boolean), experience);
  if (result.experienceId !== null) defaults.newestId = Math.max(defaults.newestId ?? 0, result.experienceId);
  return result;
}

function settleFailure(turn, sides, error) {
  const open = sides.filter((side) => side.foot.hidden); // the others are finished
  if (error.name === "AbortError") {
    const kept = open[0] === sides[0] ? "stopped by you; what was written is kept in the history" : "stopped by you";
    for (const side of open) side.finish([side.text ? kept : "stopped before the first word"], null);
    return;
  }
  // About the model the server says itself whether and when to try again.
  const wait = error.retryAfter && error.code !== "model_not_ready" ? ` Try again in ${error.retryAfter} s.` : "";
  for (const side of open) side.fail(`${sentence(error.message)}${wait}`);
  if (!turn.text) {
    // The question was not answered: give it back for another try.
    turns = turns.slice(0, -1);
    const question = turns.at(-1);
    if (question?.role === "user" && prompt.value === "") prompt.value = question.text;
    turns = turns.slice(0, -1);
  }
}

function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (controller === null && document.activeElement === document.body) prompt.focus({ preventScroll: true });
}

function send(text) {
  const content = text.trim();
  if (content === "" || running) return;
  const invalid = invalidField();
  if (invalid) {
    byId("composer").querySelector("details").open = true;
    invalid.reportValidity();
    return;
  }
  emptyBox.hidden = true;
  if (turns.length === 0) {
    setTitle(content.split("\n")[0].slice(0, 80));
    history.replaceState(null, "", `/chat?session=${encodeURIComponent(session)}`);
  }
  addTurn(new Turn("user", content));
  byId("forget-chat").hidden = false;
  prompt.value = "";
  answer();
}

// -- wiring ------------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(prompt.value);
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("new-chat").addEventListener("click", () => open(null, true));
byId("forget-chat").addEventListener("click", forget);
for (const button of document.querySelectorAll(".suggestion")) button.addEventListener("click", () => send(button.textContent));
window.addEventListener("popstate", () => open(new URLSearchParams(location.search).get("session"), false));
window.addEventListener("modelstate", ({ detail }) => { model = detail; });
live.on("history", throttle(() => readSessions().catch((error) => console.debug("sessions:", error.message)), 3000));
live.on("history", (data) => {
  defaults.newestId = Math.max(defaults.newestId ?? 0, data.newest_id);
  showBecomes();
});

async function start() {
  wireOptions(showBecomes);
  showBecomes();
  readStatus().then((status) => {
    defaults = { domain: status.default_domain ?? defaults.domain, newestId: status.history?.newest_id ?? defaults.newestId };
    byId("domain").placeholder = defaults.domain;
    showBecomes();
  }).catch((error) => console.debug("status:", error.message));
  await open(new URLSearchParams(location.search).get("session"), false);
}

start().catch((error) => {
  emptyBox.hidden = false;
  emptyBox.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, `This conversation could not be read: ${error.message}`));
});
