/* Forgetting a whole conversation or domain: what it would reach, said before it is asked for. */

import { byId, h, replace, toast } from "./dom.js";
import { api } from "./api.js";
import { integer } from "./format.js";
import { badge } from "./cartridge_view.js";
import { confirmed } from "./dialog.js";

let sessions = [];
let preview = null;
let asking = 0; // of several answers only that to the newest question counts

const domain = () => byId("forget-domain").value;
const session = () => byId("forget-session").value;
const plural = (count, one, many) => `${integer(count)} ${count === 1 ? one : many}`;

function query() {
  const wanted = new URLSearchParams();
  if (domain()) wanted.set("domain", domain());
  if (session()) wanted.set("session", session());
  return wanted;
}

/** What would happen, as sentences. */
function consequences({ cartridges, kernels, sessions_with_virtual_tokens: latent }) {
  const fresh = cartridges.filter((item) => !item.stale);
  return [
    fresh.length > 0 ? `${fresh.length === 1 ? "A cartridge becomes" : `${integer(fresh.length)} cartridges become`} stale; what serves goes on until a new run has replaced it.` : "",
    kernels.length > 0 ? `${kernels.length === 1 ? "A kernel no longer rehearses" : `${integer(kernels.length)} kernels no longer rehearse`} them; what weights hold already fades with further training.` : "",
    latent > 0 ? `The virtual tokens of ${plural(latent, "conversation", "conversations")} go as a whole.` : "",
  ].filter(Boolean);
}

function render() {
  const some = preview !== null && preview.experiences > 0;
  byId("forget-start").disabled = !some;
  byId("forget-start").textContent = some ? `Forget ${plural(preview.experiences, "experience", "experiences")}` : "Forget";
  replace(byId("forget-preview"), preview, () => {
    if (preview === null) return h("p", { class: "hint" }, "Choose what to forget: it is counted first, with everything that learned from it.");
    if (!some) return h("p", { class: "hint" }, "Nothing is left there to forget.");
    return [
      h("p", {}, `${plural(preview.experiences, "experience", "experiences")}${preview.sessions > 0 ? ` from ${plural(preview.sessions, "conversation", "conversations")}` : ""} would be gone for good.`),
      preview.cartridges.length > 0 ? h("ul", { class: "learners", "aria-label": "Cartridges that learned from them" }, preview.cartridges.map((item) => h("li", {}, badge(item.state, item.id), h("span", { class: "hint" }, ` learned from ${integer(item.learned)} of them, of ${integer(item.experiences)} in all${item.stale ? "; stale already" : ""}`)))) : h("p", { class: "hint" }, "No cartridge learned from them."),
      consequences(preview).map((text) => h("p", { class: "hint" }, text)),
    ];
  });
}

async function look() {
  const wanted = query();
  const number = ++asking;
  if (wanted.size === 0) {
    preview = null;
    render();
    return;
  }
  try {
    const told = await api.get(`/olympus/history/forgetting?${wanted}`);
    if (number !== asking) return;
    preview = told;
    render();
  } catch (error) {
    byId("forget-preview").replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" } }, error.message));
    delete byId("forget-preview").dataset.signature;
  }
}

function renderSessions() {
  const select = byId("forget-session");
  const value = select.value;
  const fitting = sessions.filter((item) => !domain() || item.domain === domain());
  replace(select, fitting, () => [h("option", { value: "" }, domain() ? "all of the domain" : "none"), ...fitting.map((item) => h("option", { value: item.id }, (item.title || item.id).slice(0, 60)))]);
  select.value = fitting.some((item) => item.id === value) ? value : "";
}

/** Offer what there is, and count anew what is chosen. */
export function renderForget(domains, talks) {
  sessions = talks;
  const select = byId("forget-domain");
  const value = select.value;
  replace(select, domains, () => [h("option", { value: "" }, "none"), ...domains.map((item) => h("option", { value: item.domain }, `${item.domain} (${integer(item.experiences)})`))]);
  select.value = domains.some((item) => item.domain === value) ? value : "";
  delete byId("forget-session").dataset.signature;
  renderSessions();
  look();
}

/** Wire the form; `changed` is called after something was forgotten. */
export function wireForget(changed) {
  byId("forget-domain").addEventListener("change", () => {
    delete byId("forget-session").dataset.signature;
    renderSessions();
    look();
  });
  byId("forget-session").addEventListener("change", look);
  byId("forget-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const what = [session() ? `the conversation “${byId("forget-session").selectedOptions[0].textContent}”` : "", domain() ? `the domain ${domain()}` : ""].filter(Boolean).join(" in ");
    const sure = await confirmed({
      title: `Forget ${plural(preview.experiences, "experience", "experiences")}?`, action: "Forget", danger: true,
      text: `All of ${what}. The texts are removed at once and cannot be brought back.`, notes: consequences(preview),
    });
    if (!sure) return;
    try {
      const told = await api.delete(`/olympus/history?${query()}`);
      toast(`${plural(told.deleted, "experience was", "experiences were")} forgotten.`);
    } catch (error) {
      toast(`Nothing was forgotten: ${error.message}`, "bad");
    }
    await changed();
    byId("forget-domain").focus({ preventScroll: true });
  });
}
