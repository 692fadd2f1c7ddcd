/* The chat page: conversations on the left, one conversation, and the composer. */

import { announce, byId, h, reconcile } from "./dom.js";
import { api } from "./api.js";
import { complete } from "./completion.js";
import { ago } from "./format.js";
import { live, readStatus, throttle } from "./shell.js";
import { measurements, Turn } from "./turns.js";

const DRAFT_KEYS = ["domain", "temperature", "max-tokens", "system"];
const MEMORY_KEY = "olympus-chat-memory";
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

// -- parameters --------------------------------------------------------------------------------------------------

function restoreParameters() {
  takeFromAddress();
  for (const key of DRAFT_KEYS) {
    byId(key).value = sessionStorage.getItem(`olympus-chat-${key}`) ?? "";
    byId(key).addEventListener("input", () => {
      sessionStorage.setItem(`olympus-chat-${key}`, byId(key).value);
      showBecomes();
    });
  }
  byId("memory").checked = sessionStorage.getItem(MEMORY_KEY) === "yes";
  byId("memory").addEventListener("change", () => sessionStorage.setItem(MEMORY_KEY, byId("memory").checked ? "yes" : "no"));
}

/** Other pages lead here with a domain, and with its memory switched on. */
function takeFromAddress() {
  const query = new URLSearchParams(location.search);
  if (query.has("domain")) sessionStorage.setItem("olympus-chat-domain", query.get("domain"));
  if (query.has("memory")) sessionStorage.setItem(MEMORY_KEY, "yes");
}

function domain() {
  return byId("domain").value.trim() || defaults.domain;
}

function requestBody(messages) {
  const system = byId("system").value.trim();
  const body = { messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  if (model?.name) body.model = model.name;
  if (byId("temperature").value !== "") body.temperature = byId("temperature").valueAsNumber;
  if (byId("max-tokens").value !== "") body.max_tokens = byId("max-tokens").valueAsNumber;
  body.olympus = { session: session, domain: domain() };
  if (byId("memory").checked) body.olympus.memory = true;
  return body;
}

function showBecomes() {
  const next = defaults.newestId === null ? "" : ` #${defaults.newestId + 1}`;
  byId("becomes").textContent = `This exchange becomes experience${next} in domain ${domain()}.`;
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
  setTitle("New chat");
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

async function answer() {
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  const turn = addTurn(new Turn("assistant"));
  turn.busy = true;
  scrollDown(true);
  setRunning(new AbortController());
  try {
    const result = await complete(requestBody(messages), { signal: running.signal, onText: (delta) => turn.append(delta, scrollDown) });
    const experience = result.experienceId === null ? null : { id: result.experienceId, domain: result.domain, score: null };
    turn.finish(measurements(result), experience);
    if (result.experienceId !== null) defaults.newestId = Math.max(defaults.newestId ?? 0, result.experienceId);
    announce(`Answer finished: ${turn.text.slice(0, 300)}`);
  } catch (error) {
    settleFailure(turn, error);
  } finally {
    setRunning(null);
    offerAgain();
    showBecomes();
    scrollDown();
    readSessions().catch((error) => console.debug("sessions:", error.message));
  }
}

function settleFailure(turn, error) {
  if (error.name === "AbortError") {
    turn.finish([turn.text ? "stopped by you; what was written is kept in the history" : "stopped before the first word"], null);
    return;
  }
  // About the model the server says itself whether and when to try again.
  const wait = error.retryAfter && error.code !== "model_not_ready" ? ` Try again in ${error.retryAfter} s.` : "";
  turn.fail(`${sentence(error.message)}${wait}`);
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
  const invalid = DRAFT_KEYS.map(byId).find((field) => !field.checkValidity());
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
for (const button of document.querySelectorAll(".suggestion")) button.addEventListener("click", () => send(button.textContent));
window.addEventListener("popstate", () => open(new URLSearchParams(location.search).get("session"), false));
window.addEventListener("modelstate", ({ detail }) => { model = detail; });
live.on("history", throttle(() => readSessions().catch((error) => console.debug("sessions:", error.message)), 3000));
live.on("history", (data) => {
  defaults.newestId = Math.max(defaults.newestId ?? 0, data.newest_id);
  showBecomes();
});

async function start() {
  restoreParameters();
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
