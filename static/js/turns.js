/* The turns of a conversation on the page: who, what, the line of measurements below, thumbs and regenerate. */

import { h, s, toast } from "./dom.js";
import { api } from "./api.js";
import { duration, isNumber } from "./format.js";
import { insideView } from "./inside_view.js";
import { renderText } from "./markdown.js";

const ICONS = {
  up: "M6.5 9 9.5 3.2c1.5 0 2.2 1 1.9 2.4L10.8 8h4.5c1 0 1.6.9 1.3 1.8l-1.6 5.5c-.2.7-.8 1.2-1.6 1.2H6.5zM6.5 9H3.4v7.5h3.1",
  down: "M13.5 11 10.5 16.8c-1.5 0-2.2-1-1.9-2.4L9.2 12H4.7c-1 0-1.6-.9-1.3-1.8L5 4.7c.2-.7.8-1.2 1.6-1.2h6.9zM13.5 11h3.1V3.5h-3.1",
  again: "M16.2 10a6.2 6.2 0 1 1-2-4.6M16.5 3v3.6h-3.6",
};

function iconButton(icon, label, onclick, props = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props },
    s("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, s("path", { class: "stroke", d: ICONS[icon] })));
}

/** One turn. `element` goes into the transcript; `text` is what it says so far. */
export class Turn {
  #frame = null;

  /** `names`: {who, label} above and for screen readers, where the role does not say enough. */
  constructor(role, text = "", names = {}) {
    this.role = role;
    this.text = text;
    this.experienceId = null;
    this.body = h("div", { class: "turn-body" });
    this.foot = h("div", { class: "turn-foot" });
    this.element = h("article", { class: "turn", dataset: { role }, "aria-label": names.label ?? (role === "user" ? "You said" : "The model answered") },
      h("p", { class: "turn-who" }, names.who ?? (role === "user" ? "You" : "Olympus")), this.body, this.foot);
    this.foot.hidden = true;
    this.tools = null;
    this.show();
  }

  /** Add streamed text; the page is redrawn at most once per frame. */
  append(delta, onDrawn) {
    this.text += delta;
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.show();
      onDrawn();
    });
  }

  show() {
    renderText(this.body, this.text);
  }

  set busy(value) {
    this.element.toggleAttribute("data-busy", value);
    this.element.setAttribute("aria-busy", String(value));
  }

  /** The line below an answer. `facts`: texts; `experience`: {id, domain, score} or null. */
  finish(facts, experience) {
    this.busy = false;
    this.show();
    const parts = facts.map((fact) => h("span", {}, fact));
    if (experience) {
      this.experienceId = experience.id;
      parts.unshift(h("span", { class: "became" }, `This exchange became experience #${experience.id} in domain ${experience.domain}`));
    }
    this.tools = h("span", { class: "turn-tools" }, experience ? thumbs(experience) : null);
    this.foot.replaceChildren(...parts, this.tools);
    this.foot.hidden = false;
  }

  /** What the workspace did, below the line of measurements. */
  showInside(report, trace) {
    this.element.append(insideView(report, trace));
  }

  /** Show the button that asks for another answer; null takes it away. */
  offerAgain(onclick) {
    this.tools?.querySelector(".again")?.remove();
    if (onclick) this.tools?.append(iconButton("again", "Answer again", onclick, { class: "icon-button again" }));
  }

  fail(message) {
    this.busy = false;
    this.foot.hidden = false;
    this.foot.replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" }, role: "alert" }, message));
  }
}

function thumbs({ id, score }) {
  const make = (icon, label, value) => iconButton(icon, label, () => judge(value), { "aria-pressed": String(isNumber(score) && Math.sign(score) === value) });
  const up = make("up", "Good answer", 1);
  const down = make("down", "Bad answer", -1);
  async function judge(value) {
    try {
      await api.post(`/olympus/history/${id}/feedback`, { score: value });
      up.setAttribute("aria-pressed", String(value === 1));
      down.setAttribute("aria-pressed", String(value === -1));
    } catch (error) {
      toast(`The judgement was not saved: ${error.message}`, "bad");
    }
  }
  return [up, down];
}

/** Tokens per second after the first one; null where there is only one. */
export function speedOf(result) {
  const writing = result.seconds - (result.firstTokenSeconds ?? 0);
  return result.tokens > 1 && writing > 0 ? (result.tokens - 1) / writing : null;
}

/** "12.3 tokens/s", "first token after 0.4 s", ... from what `complete` measured. */
export function measurements(result) {
  const facts = [];
  const speed = speedOf(result);
  if (speed !== null) facts.push(`${speed.toFixed(1)} tokens/s`);
  if (result.firstTokenSeconds !== null) facts.push(`first token after ${duration(result.firstTokenSeconds)}`);
  if (result.tokens !== null) facts.push(`${result.tokens} ${result.tokens === 1 ? "token" : "tokens"}`);
  if (result.cartridges.length > 0 && !result.memory) facts.push(`with ${result.cartridges.join(", ")}`);
  if (result.memory) facts.push(result.memory.cartridge ? `remembered with ${result.memory.cartridge}` : `without memory: ${result.memory.reason}`);
  if (result.endedBy === "timeout") facts.push("cut: it took longer than this server allows");
  else if (result.finishReason === "length") facts.push("cut at the longest answer allowed");
  return facts;
}
