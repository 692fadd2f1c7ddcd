/* What the reader has switched on: domain and sampling, the workspace and its parts, a cartridge, and whether the
   same prompt is answered without all that, too. Kept for this tab; turned into the body of a request. */

import { byId, h } from "./dom.js";
import { api } from "./api.js";
import { attachedText, attachments } from "./attachments.js";

const DRAFT_KEYS = ["domain", "temperature", "max-tokens", "system"];
const SWITCHES = ["workspace", "compare", "part-virtual_kv", "part-residual_delta", "part-controller", "part-memory"];
const OF_DOMAIN = "of the domain"; // no cartridge has an id with spaces
const KEPT = "olympus-chat-";

let changed = () => {};

/** Restore what was chosen before and call `onChange` whenever something is chosen. */
export function wireOptions(onChange) {
  changed = onChange;
  takeFromAddress();
  for (const key of DRAFT_KEYS) {
    byId(key).value = sessionStorage.getItem(KEPT + key) ?? "";
    byId(key).addEventListener("input", () => keep(key, byId(key).value));
  }
  for (const key of SWITCHES) {
    const box = byId(key);
    box.checked = (sessionStorage.getItem(KEPT + key) ?? (key.startsWith("part-") ? "yes" : "no")) === "yes";
    box.addEventListener("change", () => {
      if (key === "compare" && box.checked && without() === null) switchOn("workspace"); // something has to differ
      keep(key, box.checked ? "yes" : "no");
    });
  }
  byId("cartridge").addEventListener("change", () => keep("cartridge", byId("cartridge").value));
  readCartridges().catch((error) => console.debug("cartridges:", error.message));
  attachments.onChange = changed;
}

function keep(key, value) {
  sessionStorage.setItem(KEPT + key, value);
  changed();
}

function switchOn(key) {
  byId(key).checked = true;
  keep(key, "yes");
}

/** Other pages lead here with a domain, and with its memory switched on. */
function takeFromAddress() {
  const query = new URLSearchParams(location.search);
  if (query.has("domain")) sessionStorage.setItem(`${KEPT}domain`, query.get("domain"));
  if (query.has("memory")) sessionStorage.setItem(`${KEPT}cartridge`, OF_DOMAIN);
  fillCartridges([]);
}

async function readCartridges() {
  fillCartridges((await api.get("/olympus/cartridges")).cartridges.filter((item) => item.state !== "deleted"));
}

function fillCartridges(known) {
  const wanted = sessionStorage.getItem(`${KEPT}cartridge`) ?? "";
  const option = (value, text) => h("option", { value, selected: value === wanted }, text);
  byId("cartridge").replaceChildren(option("", "none"), option(OF_DOMAIN, "the domain's own"),
    ...known.map((item) => option(item.id, `${item.id}, ${item.state}`)));
  if (byId("cartridge").value !== wanted && known.length > 0) keep("cartridge", ""); // it is gone
}

/** The field that holds something impossible, or null. */
export function invalidField() {
  return DRAFT_KEYS.map(byId).find((field) => !field.checkValidity()) ?? null;
}

export function chosenDomain(fallback) {
  return byId("domain").value.trim() || fallback;
}

/** What is switched on, in words: "the workspace and demo_v0001"; null: nothing that could be left out. */
export function without() {
  const cartridge = byId("cartridge").value;
  const count = attachments.items.length;
  const parts = [
    byId("workspace").checked ? "the workspace" : null,
    cartridge === "" ? null : cartridge === OF_DOMAIN ? "the domain's cartridge" : cartridge,
    count === 0 ? null : count === 1 ? "one attachment" : `${count} attachments`,
  ].filter(Boolean);
  if (parts.length === 0) return null;
  return parts.length === 1 ? parts[0] : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`;
}

export function comparing() {
  return byId("compare").checked && without() !== null;
}

/** The bodies to ask with: [the chosen one], or with a comparison also the same without anything switched on. */
export function requestBodies(messages, { session, domain, model }) {
  const plain = { messages: withSystem(messages, byId("system").value.trim()) };
  if (model) plain.model = model;
  if (byId("temperature").value !== "") plain.temperature = byId("temperature").valueAsNumber;
  if (byId("max-tokens").value !== "") plain.max_tokens = byId("max-tokens").valueAsNumber;
  const chosen = { ...plain, messages: withSystem(messages, [byId("system").value.trim(), attachedText()].filter(Boolean).join("\n\n")) };
  chosen.olympus = { session, domain, ...memoryWish(byId("cartridge").value) };
  if (byId("workspace").checked) chosen.olympus.workspace = workspaceWish();
  if (!comparing()) return [chosen];
  const seed = crypto.getRandomValues(new Uint32Array(1))[0]; // one for both
  return [{ ...chosen, seed }, { ...plain, seed, store: false, olympus: { domain, workspace: false, memory: false } }];
}

function withSystem(messages, system) {
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function memoryWish(cartridge) {
  if (cartridge === "") return {};
  return cartridge === OF_DOMAIN ? { memory: true } : { cartridges: [{ id: cartridge, source: "local" }] };
}

function workspaceWish() {
  const parts = SWITCHES.filter((key) => key.startsWith("part-"));
  return { enabled: true, trace: true, ...Object.fromEntries(parts.map((key) => [key.slice("part-".length), byId(key).checked])) };
}
