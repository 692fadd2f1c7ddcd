/* The checkpoints of one kernel: what keeps each, what can be done with it, and what changed between two of them. */

import { byId, h, reconcile, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { ago, bytes, decimal, integer, isNumber, measured, percent } from "./format.js";
import { confirmed } from "./dialog.js";

const NEVER_DELETED = ["latest", "pinned", "in_use"];
const ASKED = { // what is said before something that is not easily taken back
  restore: (step) => ({ title: `Go back to step ${step}?`, action: "Restore", text: "Its weights are published again as the newest step. Nothing is removed, and what was newer can be restored in the same way." }),
  delete: (step) => ({ title: `Delete the checkpoint of step ${step}?`, action: "Delete", danger: true, text: "Its files are removed from this server. The other checkpoints and what the kernel knows now stay." }),
};

export class Checkpoints {
  #path;
  #changed;

  /** `path`: the kernel's, below /olympus; `changed()` is called after an action. */
  constructor(path, changed) {
    this.#path = path;
    this.#changed = changed;
    byId("diff-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#compare();
    });
    for (const id of ["diff-base", "diff-other"]) byId(id).addEventListener("change", (event) => { event.currentTarget.dataset.chosen = "yes"; });
  }

  async read() {
    const page = await api.get(`${this.#path}/checkpoints`);
    const body = byId("cp-table").tBodies[0];
    byId("cp-note").textContent = page.checkpoints.length === 0 ? "" : `${integer(page.checkpoints.length)} on disk, ${bytes(page.total_bytes)}`;
    const newestFirst = [...page.checkpoints].sort((a, b) => b.step - a.step);
    this.#fillChoices(newestFirst);
    if (newestFirst.length === 0) {
      body.replaceChildren(h("tr", {}, h("td", { colspan: 7, class: "empty wide" }, "None yet. One is written every few hundred steps, and whenever training stops.")));
      return;
    }
    reconcile(body, newestFirst, (item) => item.id, (item) => this.#row(item));
  }

  #row(item) {
    const button = (label, run) => h("button", { class: "button", type: "button", dataset: { size: "small" }, onclick: run, "aria-label": `${label} the checkpoint of step ${item.step}` }, label);
    const kept = item.kept_by.map((rule) => rule.replaceAll("_", " ")).join(", ") || "nothing: it goes next";
    return h("tr", {},
      h("th", { scope: "row" }, `Step ${integer(item.step)}`),
      h("td", { "data-label": "Written" }, ago(item.created_at)),
      h("td", { class: "num", "data-label": "Held-out" }, measured(item.metrics.holdout, decimal, "not measured before it was written")),
      h("td", { class: "num", "data-label": "Φ" }, measured(item.metrics.phi, decimal, "not measured before it was written")),
      h("td", { class: "num", "data-label": "Size" }, bytes(item.bytes)),
      h("td", { class: "wide", "data-label": "Kept by" }, item.valid === false ? h("strong", {}, "damaged: it is not used") : kept),
      h("td", { class: "wide" }, h("span", { class: "button-row" },
        button(item.pinned ? "Unpin" : "Pin", () => this.#act(item, item.pinned ? "unpin" : "pin")), button("Restore", () => this.#act(item, "restore")),
        item.kept_by.some((rule) => NEVER_DELETED.includes(rule)) ? null : button("Delete", () => this.#act(item, "delete")))));
  }

  async #act(item, action) {
    const step = integer(item.step);
    if (ASKED[action] && !(await confirmed(ASKED[action](step)))) return;
    const place = `${this.#path}/checkpoints/${encodeURIComponent(item.id)}`;
    try {
      await (action === "delete" ? api.delete(place) : api.post(`${place}/${action}`));
      toast(`Checkpoint of step ${step}: ${action} done.`);
    } catch (error) {
      toast(`Checkpoint of step ${step}: ${error.message}`, "bad");
    }
    await this.#changed();
  }

  // What changed between two.

  #fillChoices(newestFirst) {
    byId("diff").hidden = newestFirst.length < 2;
    const names = newestFirst.map(({ id, step }) => [id, step]);
    for (const [field, fallback] of [["diff-base", names.at(-1)], ["diff-other", names[0]]]) {
      const select = byId(field);
      const before = select.dataset.chosen === undefined ? null : select.value; // until then: the oldest and the newest
      replace(select, names, () => names.map(([id, step]) => h("option", { value: id }, `Step ${integer(step)}`)));
      select.value = names.some(([id]) => id === before) ? before : (fallback?.[0] ?? "");
    }
  }

  async #compare() {
    const [base, other] = [byId("diff-base").value, byId("diff-other").value];
    const box = byId("diff-result");
    if (base === other) {
      box.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, "Choose two different checkpoints."));
      return;
    }
    try {
      const told = await api.get(`${this.#path}/checkpoints/${encodeURIComponent(other)}/diff?base=${encodeURIComponent(base)}`);
      box.replaceChildren(h("p", { class: "diff-sentence" }, sentenceOf(told)), h("div", { class: "diff-tables" }, numbersTable(told), weightsTable(told.weights)), askBoth(this.#path, told));
    } catch (error) {
      box.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, `They could not be compared: ${error.message}`));
    }
  }
}

function sentenceOf({ base, other, weights, numbers, basin_distance: basin }) {
  const loss = numbers.holdout_loss.change;
  return [
    `From step ${integer(base.step)} to step ${integer(other.step)} the weights moved by ${isNumber(weights.moved) ? percent(weights.moved) : "an unknown part"} of their length.`,
    isNumber(loss) ? `On examples it has never seen it became ${decimal(Math.abs(loss))} nats ${loss <= 0 ? "better" : "worse"}.` : null,
    isNumber(basin) ? `Its basin moved by ${decimal(basin)} of at most 3.142.` : null,
  ].filter(Boolean).join(" ");
}

const NUMBERS = [
  ["holdout_loss", "Held-out loss", decimal], ["baseline_loss", "Baseline", decimal], ["best_loss", "Best held-out", decimal], ["loss_ema", "Training loss", decimal],
  ["phi", "Φ", decimal], ["kappa", "κ, coupling", decimal], ["eff_rank", "Effective rank", (value) => decimal(value, 1)], ["dead_units", "Dead units", integer],
  ["lr_scale", "Learning rate factor", decimal], ["bytes_seen", "Bytes seen", integer],
];

function numbersTable({ base, other, numbers }) {
  const cell = (value, format) => h("td", { class: "num" }, measured(value, format, "not measured before it was written"));
  return h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Measurements of both, table" }, h("table", { class: "data-table" },
    h("caption", {}, "Measured"),
    h("thead", {}, h("tr", {}, ["Quantity", `Step ${integer(base.step)}`, `Step ${integer(other.step)}`, "Change"].map((label, index) => h("th", { scope: "col", class: index > 0 ? "num" : null }, label)))),
    h("tbody", {}, NUMBERS.map(([name, label, format]) => h("tr", {}, h("th", { scope: "row" }, label), cell(numbers[name].base, format), cell(numbers[name].other, format),
      h("td", { class: "num" }, isNumber(numbers[name].change) ? signed(numbers[name].change, format) : "–"))))));
}

function signed(value, format) {
  return value === 0 ? "0" : `${value > 0 ? "+" : "−"}${format(Math.abs(value))}`;
}

function weightsTable({ parts }) {
  const most = Math.max(...parts.map(({ moved }) => moved ?? 0)) || 1;
  const bar = (moved) => {
    const fill = h("div", { class: "meter-fill" });
    fill.style.width = `${(100 * moved) / most}%`;
    return h("span", { class: "moved-cell" }, h("span", {}, percent(moved)), h("span", { class: "meter", "aria-hidden": "true" }, fill));
  };
  return h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Weights by part, table" }, h("table", { class: "data-table" },
    h("caption", {}, "How far the weights moved, part by part"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Part"), h("th", { scope: "col", class: "num" }, "Numbers"), h("th", { scope: "col" }, "Moved by"), h("th", { scope: "col", class: "num" }, "Cosine"))),
    h("tbody", {}, parts.map((part) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, part.part)), h("td", { class: "num" }, integer(part.numbers)),
      h("td", {}, isNumber(part.moved) ? bar(part.moved) : "was zero"), h("td", { class: "num" }, measured(part.cosine, decimal, "one of them is zero")))))));
}

/** One question, answered by both. */
function askBoth(path, { base, other }) {
  const question = h("input", { id: "diff-question", required: true, maxlength: 4000 });
  const answers = h("div", { class: "diff-answers", "aria-live": "polite" });
  const form = h("form", { class: "diff-ask", autocomplete: "off" }, h("div", { class: "field" }, h("label", { for: "diff-question" }, "Ask both the same"), question), h("button", { class: "button", type: "submit" }, "Ask both"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const told = await Promise.all([base, other].map(({ id }) => api.post(`${path}/query`, { input: question.value, checkpoint: id })));
      answers.replaceChildren(...told.map((answer, index) => h("article", {}, h("h4", {}, `Step ${integer([base, other][index].step)}`), h("p", {}, answer.output || "(it answered with nothing)"), h("p", { class: "hint" }, `confidence ${percent(answer.confidence)}`))));
    } catch (error) {
      answers.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, error.message));
    }
  });
  return h("div", {}, form, answers);
}
