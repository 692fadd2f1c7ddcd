/* A kernel's two boxes: ask it something, feed it something. */

import { byId, h } from "./dom.js";
import { api } from "./api.js";
import { decimal, duration, integer, isNumber, measured, percent } from "./format.js";
import { describePairs, MOST_PAIRS, parsePairs } from "./pairs.js";

function notice(text) {
  return h("p", { class: "notice", dataset: { tone: "bad" } }, text);
}

function ranking(items) {
  return h("ol", { class: "ranked" }, items.map((item) => {
    const share = item.confidence;
    const fill = h("div", { class: "meter-fill" });
    fill.style.width = isNumber(share) ? `${100 * share}%` : "0";
    return h("li", {}, h("span", {}, item.candidate), h("div", { class: "meter" }, fill), h("span", { class: "num" }, measured(share, percent)));
  }));
}

function answerView(answer) {
  const facts = [
    isNumber(answer.confidence) ? `confidence ${percent(answer.confidence)}` : null,
    isNumber(answer.latency_ms) ? duration(answer.latency_ms / 1000) : null,
    answer.checkpoint_used ? `from ${answer.checkpoint_used}` : null,
    isNumber(answer.depth) ? `recursion depth ${decimal(answer.depth, 1)}` : null,
  ].filter(Boolean);
  return [
    answer.candidates ? ranking(answer.candidates) : h("p", { class: "query-output" }, answer.output || "(it answered with nothing)"),
    h("p", { class: "hint" }, facts.join(", "), answer.ready === false ? ". It has not converged: take the answer as a sign of progress." : "."),
  ];
}

function onSubmit(formId, resultId, run) {
  const form = byId(formId);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    try {
      byId(resultId).replaceChildren(...[await run(form)].flat());
    } catch (error) {
      byId(resultId).replaceChildren(notice(error.message));
    } finally {
      button.disabled = false;
    }
  });
}

async function ask(path) {
  const body = { input: byId("query-input").value };
  const candidates = byId("query-candidates").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (candidates.length > 0) body.candidates = candidates;
  return answerView(await api.post(`${path}/query`, body));
}

async function feed(path, form, done) {
  const parsed = parsePairs(byId("feed-data").value);
  if (parsed.problems.length > 0) return notice(`Nothing was added: ${describePairs(parsed)}.`);
  if (parsed.pairs.length > MOST_PAIRS) return notice(`At most ${integer(MOST_PAIRS)} at once.`);
  const result = await api.post(`${path}/experiences`, { experiences: parsed.pairs });
  form.reset();
  done();
  const known = result.duplicates ? `, ${integer(result.duplicates)} known already` : "";
  return `${integer(result.accepted)} added to the history${known}.`;
}

export function wireForms(path, done) {
  onSubmit("query-form", "query-result", () => ask(path));
  onSubmit("feed-form", "feed-result", (form) => feed(path, form, done));
}
