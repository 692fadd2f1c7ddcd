/* One question, answered with a domain's cartridge and without: what it knows, and what it costs to know it. */

import { byId, h } from "./dom.js";
import { api } from "./api.js";
import { duration, integer } from "./format.js";

const LONGEST = 96;

function answer(title) {
  const text = h("p", { class: "try-text" }, "…");
  const facts = h("p", { class: "hint" });
  return { text, facts, element: h("article", { "aria-label": title }, h("h4", {}, title), text, facts) };
}

/** Ask once and fill `box`. Nothing of it is written into the history. */
async function ask(box, question, cartridge) {
  const begun = performance.now();
  const body = { messages: [{ role: "user", content: question }], temperature: 0, max_tokens: LONGEST, store: false };
  if (cartridge) body.cartridges = [{ id: cartridge, source: "local" }];
  try {
    const told = await api.post("/v1/chat/completions", body);
    const slots = told.usage.cartridge_slots ?? 0;
    box.text.textContent = told.choices[0].message.content || "(it answered with nothing)";
    box.facts.textContent = `${integer(told.usage.prompt_tokens)} tokens of prompt${slots ? ` and ${integer(slots)} slots` : ""}, ${integer(told.usage.completion_tokens)} written in ${duration((performance.now() - begun) / 1000)}`;
  } catch (error) {
    box.element.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, error.message));
  }
}

/** Wire the form; `serving()` gives the id of the cartridge to ask. */
export function wireTry(serving) {
  const form = byId("try-form");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const id = serving();
    if (!id) return;
    const button = form.querySelector("button");
    button.disabled = true;
    const boxes = [answer(`With ${id}`), answer("Without")];
    byId("try-answers").replaceChildren(...boxes.map((box) => box.element));
    const question = byId("try-question").value;
    await ask(boxes[0], question, id); // one after the other: together each would take twice as long
    await ask(boxes[1], question, null);
    button.disabled = false;
  });
}
