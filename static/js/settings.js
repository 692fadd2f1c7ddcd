/* The page of the settings: API keys (made, shown once, revoked), and the configuration in use. */

import { announce, byId, h, reconcile, toast } from "./dom.js";
import { api } from "./api.js";
import { ago, integer } from "./format.js";
import { stateBadge } from "./kernel_view.js";
import { confirmed } from "./dialog.js";
import { keepFresh } from "./shell.js";

const SCOPES = {
  chat: "talk to the model",
  "kernels:read": "see kernels, the status and the live stream",
  "kernels:write": "spawn, feed, steer and delete kernels",
  "history:read": "read and search what was lived through",
  "history:write": "add, judge, correct and forget",
  "cartridges:read": "see cartridges and distillations",
  "cartridges:write": "start distillations, decide what serves",
  admin: "everything, also keys and the audit log",
};
const MARKS = { active: "ok", expired: "paused", revoked: "stopped" };
let keys = [];
let you = null;
let settings = [];

// -- the list of keys --------------------------------------------------------------------------------------------

function keyRow({ key, own }) {
  const active = key.state === "active";
  return h("tr", { dataset: { state: key.state } },
    h("th", { scope: "row" }, key.name, h("span", { class: "sub" }, h("code", {}, `oly_${key.id}_…`), own ? " the one you use" : "")),
    h("td", { "data-label": "State" }, stateBadge(MARKS[key.state], key.state), key.revoked_at ? h("span", { class: "sub" }, ago(key.revoked_at)) : null),
    h("td", { class: "wide", "data-label": "Scopes" }, h("ul", { class: "scope-list", "aria-label": "Scopes" }, key.scopes.map((scope) => h("li", {}, scope)))),
    h("td", { "data-label": "Last used" }, key.last_used_at ? ago(key.last_used_at) : h("span", { class: "missing" }, "never")),
    h("td", { "data-label": "Expires" }, key.expires_at ? h("time", { class: "moment" }, new Date(1000 * key.expires_at).toLocaleDateString()) : "never"),
    h("td", { class: "wide" }, active ? h("button", { class: "button", type: "button", dataset: { size: "small", kind: "danger" }, "aria-label": `Revoke ${key.name}`, onclick: () => revoke(key, own) }, "Revoke") : null));
}

function renderKeys() {
  const body = byId("keys-table").tBodies[0];
  const active = keys.filter((key) => key.state === "active").length;
  byId("keys-table").tHead.hidden = keys.length === 0;
  byId("keys-count").textContent = keys.length === 0 ? "" : `${integer(active)} active of ${integer(keys.length)}`;
  byId("keys-you").textContent = you === null ? "" : you.id === "local" ? "You need none: this server listens on this machine only, and so do you." : you.id.startsWith("bootstrap-") ? "You use the bootstrap key of the configuration, which is not in this list." : `You use ${you.name}.`;
  if (keys.length === 0) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: 6, class: "empty wide" }, "No key yet. A server that listens beyond this machine does not start without one.")));
    return;
  }
  const shown = [...keys].sort((a, b) => (b.state === "active") - (a.state === "active") || b.created_at - a.created_at);
  reconcile(body, shown.map((key) => ({ key, own: key.id === you?.id })), (item) => item.key.id, keyRow);
}

async function revoke(key, own) {
  const notes = own ? ["It is the key that you use here: you are signed out with it."] : [];
  const sure = await confirmed({ title: `Revoke ${key.name}?`, action: "Revoke", danger: true, text: "Whoever uses it is refused from that moment on, also in open streams and browser sessions. It cannot be taken back.", notes });
  if (!sure) return;
  try {
    await api.post(`/olympus/keys/${key.id}/revoke`);
    toast(`${key.name} was revoked.`);
    announce(`${key.name} was revoked`);
  } catch (error) {
    toast(`It was not revoked: ${error.message}`, "bad");
  }
  await refresh();
  byId("keys-table").parentElement.focus({ preventScroll: true });
}

// -- making one --------------------------------------------------------------------------------------------------

function renderScopes(names) {
  if (byId("key-scopes").childElementCount > 0) return;
  byId("key-scopes").replaceChildren(...names.map((name) => h("label", { class: "scope" },
    h("input", { type: "checkbox", name: "scopes", value: name, checked: name === "chat" }), h("span", {}, h("code", {}, name), h("span", { class: "hint" }, ` ${SCOPES[name] ?? ""}`)))));
}

function showError(text) {
  byId("key-error").hidden = text === "";
  byId("key-error").textContent = text;
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  showError("");
  const form = event.currentTarget;
  const scopes = [...form.querySelectorAll("input[name=scopes]:checked")].map((box) => box.value);
  if (scopes.length === 0) return showError("Choose at least one scope.");
  const body = { name: form.elements.name.value, scopes };
  if (form.elements.expiry.value) body.expires_in_days = Number(form.elements.expiry.value);
  try {
    showMade(await api.post("/olympus/keys", body));
  } catch (error) {
    return showError(`No key was made: ${error.message}`);
  }
  form.reset();
  return refresh();
});

function showMade(made) {
  byId("made-title").textContent = `The key of ${made.name}`;
  byId("made-key").textContent = made.key;
  byId("key-made").hidden = false;
  byId("key-form").hidden = true;
  byId("key-made").focus();
}

byId("made-copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(byId("made-key").textContent);
    byId("made-copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("made-key")); // no clipboard outside https and localhost
    byId("made-copy").textContent = "Press Ctrl+C";
  }
  setTimeout(() => { byId("made-copy").textContent = "Copy"; }, 3000);
});

byId("made-done").addEventListener("click", () => {
  byId("made-key").textContent = "";
  byId("key-made").hidden = true;
  byId("key-form").hidden = false;
  byId("key-name").focus();
});

// -- the configuration -------------------------------------------------------------------------------------------

const SECTIONS = {
  "": "Everything", server: "Server", database: "Database", model: "Model", engine: "Engine", workspace: "Workspace", kernels: "Kernels", memory: "Memory", cartridges: "Cartridges", distillation: "Distillation", telemetry: "Telemetry",
};

function written(value) {
  if (value === null) return h("span", { class: "missing" }, "not set");
  if (Array.isArray(value) || typeof value === "object") return Object.keys(value).length === 0 ? h("span", { class: "missing" }, "none") : h("code", {}, JSON.stringify(value));
  return h("code", {}, value === "" ? "\"\"" : String(value));
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function settingRow(item) {
  const set = item.origin !== "default";
  const [kind, ...rest] = item.origin.split(" ");
  return h("tr", { dataset: { set: String(set) } },
    h("th", { scope: "row" }, h("code", {}, item.path), h("span", { class: "sub" }, item.description)),
    h("td", { "data-label": "Value" }, written(item.value), set && !same(item.value, item.default) && item.default !== null ? h("span", { class: "sub" }, "default ", written(item.default)) : null),
    h("td", { "data-label": "Comes from" }, set ? [kind, rest.length > 0 ? [" ", h("code", {}, rest.join(" "))] : null] : h("span", { class: "hint" }, "default")));
}

function renderSettings() {
  const form = byId("configuration-form");
  const wanted = byId("configuration-q").value.trim().toLowerCase();
  const onlySet = form.elements.which.value === "set";
  const shown = settings.filter((item) => (!onlySet || item.origin !== "default") && (!wanted || `${item.path} ${item.description} ${item.origin}`.toLowerCase().includes(wanted)));
  const set = settings.filter((item) => item.origin !== "default").length;
  byId("configuration-count").textContent = settings.length === 0 ? "" : shown.length === settings.length ? `${integer(settings.length)} settings, ${integer(set)} not left to their default` : `${integer(shown.length)} of ${integer(settings.length)}`;
  if (shown.length === 0) {
    byId("configuration-list").replaceChildren(h("p", { class: "empty" }, settings.length === 0 ? "" : onlySet && !wanted ? "Everything is left to its default." : "No setting fits."));
    return;
  }
  byId("configuration-list").replaceChildren(...[...grouped(shown)].map(([section, items]) => h("details", { class: "config-section", open: wanted !== "" || onlySet || section === "server" },
    h("summary", {}, h("span", { class: "config-name" }, SECTIONS[section] ?? section), h("span", { class: "hint" }, ` ${integer(items.length)}`)),
    h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": `Settings: ${SECTIONS[section] ?? section}` },
      h("table", { class: "data-table card-table config-table" },
        h("thead", {}, h("tr", {}, ["Setting", "Value", "Comes from"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, items.map(settingRow)))))));
}

const sectionOf = (item) => (item.path.includes(".") ? item.path.split(".")[0] : "");

function grouped(items) {
  const found = new Map();
  for (const item of items) found.set(sectionOf(item), [...(found.get(sectionOf(item)) ?? []), item]);
  return found;
}

byId("configuration-form").addEventListener("submit", (event) => event.preventDefault());
byId("configuration-form").addEventListener("input", renderSettings);

// -- wiring ------------------------------------------------------------------------------------------------------

async function refresh() {
  try {
    const told = await api.get("/olympus/keys");
    [keys, you] = [told.keys, told.you];
    renderScopes(told.scopes);
    renderKeys();
    if (settings.length === 0) {
      settings = (await api.get("/olympus/settings")).settings;
      renderSettings();
    }
    byId("page-error").hidden = true;
  } catch (error) {
    byId("page-error").hidden = false;
    byId("page-error").textContent = error.status === 403 ? "Keys and the configuration are shown to administrators only: sign in with a key that has the scope admin." : `Not up to date: ${error.message}`;
    byId("keys").hidden = byId("configuration").hidden = error.status === 403;
  }
}

keepFresh(refresh);
