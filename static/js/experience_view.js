/* Experiences: a line of the list, and one of them whole with everything that can be done about it. */

import { byId, h, toast } from "./dom.js";
import { api } from "./api.js";
import { ago, decimal, integer, isNumber } from "./format.js";
import { badge } from "./cartridge_view.js";
import { confirmed } from "./dialog.js";

const path = (id) => `/olympus/history/${id}`;

export function judgement(score) {
  if (!isNumber(score)) return null;
  const word = score > 0 ? "judged good" : score < 0 ? "judged bad" : "judged neither good nor bad";
  return Math.abs(score) === 1 || score === 0 ? word : `${word}, ${decimal(score, 2)}`;
}

/** Why a search found it: "2nd by words, 1st by meaning". */
function why(parts) {
  const rank = (n) => (n === 1 ? "best" : `number ${n}`);
  const by = Object.entries(parts).filter(([, part]) => part !== null).map(([name, part]) => `${rank(part.rank)} by ${name}`);
  return by.join(", ");
}

/** A line of the list. `item`: an experience, or a result of the search with `parts`; `open(id)` shows it whole. */
export function experienceLine(item, open) {
  const score = item.parts ? item.judged : item.score;
  return h("li", {},
    h("button", { type: "button", class: "experience", "aria-pressed": String(Boolean(item.chosen)), onclick: () => open(item.id) },
      h("span", { class: "said" }, item.observation || "(nothing was said)"), h("span", { class: "answered" }, item.action || "(no answer)"),
      h("span", { class: "about" }, h("span", {}, `#${item.id}`), h("span", {}, item.domain), item.source ? h("span", {}, `from ${item.source}`) : null,
        judgement(score) ? h("span", {}, judgement(score)) : null, ago(item.created_at),
        item.parts ? h("span", { class: "found-by" }, why(item.parts)) : null)));
}

function text(label, value, empty) {
  return h("div", { class: "told" }, h("h3", {}, label), value ? h("p", { class: "told-text", tabindex: 0, role: "group", "aria-label": label }, value) : h("p", { class: "missing" }, empty));
}

function facts(item) {
  const rows = [
    ["Written", ago(item.created_at)], ["Domain", item.domain], ["Source", item.source],
    ["Conversation", item.session_id], ["Episode", item.episode_id], ["Judged", judgement(item.score)?.replace("judged ", "")],
    ["Corrects", item.meta?.corrects ? `#${item.meta.corrects}, which was forgotten` : null],
    ["Cartridges in it", (item.meta?.cartridges ?? []).map((one) => one.id ?? one).join(", ")],
    ["Tokens", isNumber(item.meta?.completion_tokens) ? `${integer(item.meta.prompt_tokens ?? 0)} read, ${integer(item.meta.completion_tokens)} written` : null],
  ].filter(([, value]) => value);
  return h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function folded(title, content) {
  return h("details", { class: "twin" }, h("summary", {}, title), h("pre", { class: "raw", tabindex: 0, "aria-label": title }, content));
}

/** The cartridges that learned from it: [] when none did, null when this key may not see them. */
async function learners(id) {
  try {
    return (await api.get(`/olympus/cartridges?experience=${id}`)).cartridges;
  } catch (error) {
    if (error.status === 401) throw error;
    return null;
  }
}

function learned(known) {
  if (known === null) return h("p", { class: "hint" }, "Which cartridges learned from it cannot be shown with this key.");
  if (known.length === 0) return h("p", { class: "hint" }, "No cartridge learned from it.");
  return h("ul", { class: "learners" }, known.map((item) => h("li", {}, badge(item.state, item.id), h("span", { class: "hint" }, ` ${item.state}${item.stale ? ", stale already" : ""}`))));
}

/** What deleting or correcting does to cartridges, as a sentence. */
function consequence(known) {
  if (known === null) return "Cartridges that learned from it become stale.";
  const fresh = known.filter((item) => !item.stale);
  if (fresh.length === 0) return known.length === 0 ? "No cartridge learned from it, so none becomes stale." : "The cartridges that learned from it are stale already.";
  const serving = fresh.filter((item) => item.state === "serving");
  const names = fresh.map((item) => item.id).join(", ");
  const goesOn = serving.length > 0 ? ` ${serving.map((item) => item.id).join(", ")} goes on serving until a new run has replaced it.` : "";
  return `${names} learned from it and ${fresh.length === 1 ? "becomes" : "become"} stale.${goesOn}`;
}

/** Fetch experience `id` and show it. `changed(newId)` is called when it was judged, corrected or deleted (null). */
export async function showExperience(id, changed) {
  const [item, known] = await Promise.all([api.get(path(id)), learners(id)]);
  byId("inspect-id").textContent = `#${item.id}`;
  byId("inspect-none").hidden = true;
  const body = byId("inspect-body");
  body.hidden = false;
  body.replaceChildren(
    text("What was said", item.observation, "nothing"), text("What was answered", item.action, "nothing: the answer was empty"),
    item.feedback ? text("Feedback", item.feedback, "") : "",
    facts(item), judging(item, changed),
    h("div", { class: "told" }, h("h3", {}, "What learned from it"), learned(known)),
    correcting(item, known, changed),
    item.messages ? folded("The messages that the model was asked with", item.messages.map(({ role, content }) => `${role}: ${typeof content === "string" ? content : JSON.stringify(content)}`).join("\n\n")) : "",
    folded("Everything that was noted with it", JSON.stringify(item.meta, null, 2)),
    h("p", {}, h("button", { class: "button", type: "button", dataset: { kind: "danger" }, onclick: () => remove(item, changed) }, "Delete")));
}

export function showNothing(reason) {
  byId("inspect-id").textContent = "";
  byId("inspect-body").hidden = true;
  byId("inspect-none").hidden = false;
  byId("inspect-none").textContent = reason;
}

// -- judging -----------------------------------------------------------------------------------------------------

function judging(item, changed) {
  const choice = (label, value) => h("label", {}, h("input", { type: "radio", name: "score", value, checked: isNumber(item.score) && Math.sign(item.score) === value }), " ", h("span", {}, label));
  const form = h("form", { class: "stack judge-form", autocomplete: "off" },
    h("h3", {}, "Judge it"),
    h("fieldset", { class: "field" }, h("legend", { class: "visually-hidden" }, "Score"), h("div", { class: "choices" }, choice("Good", 1), choice("Neither", 0), choice("Bad: never imitate it", -1))),
    h("div", { class: "field" }, h("label", { for: "judge-text" }, "Feedback ", h("span", { class: "optional" }, "optional")), h("input", { id: "judge-text", maxlength: 2000, value: item.feedback ?? null, placeholder: "Incorrect! The correct answer is …" })),
    h("p", {}, h("button", { class: "button", type: "submit" }, "Save the judgement")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const chosen = form.elements.score.value;
    const feedback = form.elements["judge-text"].value.trim();
    if (chosen === "" && feedback === "") return toast("Choose a score, write a feedback, or both.", "bad");
    try {
      await api.post(`${path(item.id)}/feedback`, { score: chosen === "" ? null : Number(chosen), feedback: feedback || null });
      toast(`#${item.id} was judged.`);
      await changed(item.id);
    } catch (error) {
      toast(`The judgement was not saved: ${error.message}`, "bad");
    }
  });
  return form;
}

// -- correcting and forgetting -----------------------------------------------------------------------------------

function correcting(item, known, changed) {
  const area = (id, label, value) => {
    const box = h("textarea", { id, rows: 3 });
    box.value = value;
    return h("div", { class: "field" }, h("label", { for: id }, label), box);
  };
  const error = h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert", hidden: true });
  const form = h("form", { class: "stack", autocomplete: "off" },
    area("correct-observation", "What was said", item.observation), area("correct-action", "What should have been answered", item.action),
    h("p", { class: "hint" }, `A new experience takes its place and counts as confirmed; this one is forgotten. ${consequence(known)}`), error,
    h("p", {}, h("button", { class: "button", dataset: { kind: "primary" }, type: "submit" }, "Put it right")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const [observation, action] = ["correct-observation", "correct-action"].map((name) => form.elements[name].value);
    const body = {};
    if (observation !== item.observation) body.observation = observation;
    if (action !== item.action) body.action = action;
    error.hidden = Object.keys(body).length > 0;
    error.textContent = "Nothing is different yet.";
    if (!error.hidden) return;
    try {
      const made = await api.post(`${path(item.id)}/correct`, body);
      toast(`#${item.id} was corrected: #${made.id} stands in its place.`);
      await changed(made.id);
    } catch (problem) {
      error.hidden = false;
      error.textContent = `It was not corrected: ${problem.message}`;
    }
  });
  return h("details", { class: "twin correct-box" }, h("summary", {}, "Correct it"), form);
}

async function remove(item, changed) {
  const known = await learners(item.id);
  const sure = await confirmed({
    title: `Delete experience #${item.id}?`, action: "Delete", danger: true,
    text: "Its texts are removed at once, from the search and from what its conversation keeps. This cannot be taken back.",
    notes: [consequence(known)],
  });
  if (!sure) return;
  try {
    await api.delete(path(item.id));
    toast(`#${item.id} was deleted.`);
    await changed(null);
  } catch (error) {
    toast(`It was not deleted: ${error.message}`, "bad");
  }
}
