/* Memory that the reader attaches to the prompt: experiences, found by the search, sent in the system message. */

import { byId, h, reconcile } from "./dom.js";
import { api } from "./api.js";
import { judgement } from "./experience_view.js";

const FOUND = 8;
const HEAD = "From memory, chosen for this conversation:";

/** `items`: experiences {id, observation, action}; `onChange` is called when one comes or goes. */
export const attachments = { items: [], onChange: () => {} };

/** What is added to the system message; "" without attachments. */
export function attachedText() {
  if (attachments.items.length === 0) return "";
  return [HEAD, ...attachments.items.map(({ observation, action }) => `- ${oneLine(observation)}\n  ${oneLine(action)}`)].join("\n");
}

function oneLine(text) {
  return text.replace(/\s+/g, " ").trim();
}

function change(items) {
  attachments.items = items;
  render();
  attachments.onChange();
}

/** Attach nothing any more: a new conversation begins. */
export function clearAttachments() {
  if (attachments.items.length > 0) change([]);
}

function render() {
  const list = byId("attached");
  list.hidden = attachments.items.length === 0;
  reconcile(list, attachments.items.map(({ id, observation }) => ({ id, observation })), (item) => item.id, (item) => h("li", { class: "chip" },
    h("span", { class: "chip-text" }, `#${item.id} ${oneLine(item.observation)}`),
    h("button", { type: "button", class: "chip-remove", "aria-label": `Detach #${item.id}`, onclick: () => {
      change(attachments.items.filter(({ id }) => id !== item.id));
      byId("attach").focus();
    } }, "×")));
  byId("attach").textContent = attachments.items.length === 0 ? "Attach memory" : `Attach memory (${attachments.items.length})`;
}

// -- the dialog --------------------------------------------------------------------------------------------------

function resultLine(item) {
  const attached = attachments.items.some(({ id }) => id === item.id);
  return h("li", {},
    h("p", { class: "said" }, item.observation), h("p", { class: "answered" }, item.action || "(no answer)"),
    h("p", { class: "about" }, h("span", {}, `#${item.id}`), h("span", {}, item.domain), judgement(item.judged) ? h("span", {}, judgement(item.judged)) : null),
    h("button", { class: "button", type: "button", dataset: { size: "small" }, "aria-pressed": String(attached), "aria-label": `Attach #${item.id}`, onclick: (event) => toggle(item, event.currentTarget) }, attached ? "Attached" : "Attach"));
}

function toggle(item, button) {
  const attached = attachments.items.some(({ id }) => id === item.id);
  change(attached ? attachments.items.filter(({ id }) => id !== item.id) : [...attachments.items, item]);
  button.setAttribute("aria-pressed", String(!attached));
  button.textContent = attached ? "Attach" : "Attached";
}

async function search(event) {
  event.preventDefault();
  const note = byId("attach-note");
  try {
    const query = new URLSearchParams({ q: byId("attach-query").value.trim(), limit: FOUND });
    const { results } = await api.get(`/olympus/memory/search?${query}`);
    note.textContent = results.length === 0 ? "Nothing fits. Try other words." : "";
    byId("attach-results").replaceChildren(...results.map(resultLine));
  } catch (error) {
    byId("attach-results").replaceChildren();
    note.textContent = error.code === "memory_disabled" ? "The search is switched off on this server: memory.episodic.enabled is false." : `It could not be searched: ${error.message}`;
  }
}

byId("attach").addEventListener("click", () => {
  byId("attach-note").textContent = "";
  byId("attach-results").replaceChildren();
  byId("attach-dialog").showModal();
});
byId("attach-form").addEventListener("submit", search);
byId("attach-close").addEventListener("click", () => byId("attach-dialog").close());
