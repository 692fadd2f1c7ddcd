/* The list of kernels and the form that spawns one. */

import { announce, byId } from "./dom.js";
import { api } from "./api.js";
import { integer } from "./format.js";
import { keepFresh, live, throttle } from "./shell.js";
import { kernelPath, mergeEvent, renderKernels } from "./kernel_view.js";
import { describePairs, MOST_PAIRS, parsePairs } from "./pairs.js";

const form = byId("spawn-form");
let kernels = [];
let idempotencyKey = freshKey();

function freshKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function render() {
  byId("kernel-count").textContent = kernels.length === 0 ? "" : `${integer(kernels.length)} in all`;
  renderKernels(byId("kernel-table"), kernels, "No kernel yet. Spawn one with the form on this page: a domain and a few examples are enough.");
}

async function refresh() {
  try {
    kernels = (await api.get("/olympus/kernels")).kernels;
    render();
  } catch (error) {
    byId("kernel-count").textContent = `not up to date: ${error.message}`;
  }
}

function showError(text) {
  const box = byId("spawn-error");
  box.hidden = text === "";
  box.textContent = text;
}

/** The body of POST /olympus/kernels/spawn, or null after showing what is wrong. */
function spawnBody() {
  const invalid = [...form.elements].find((field) => field.willValidate && !field.checkValidity());
  if (invalid) {
    showError(invalid.name === "domain" || invalid.name === "name" ? "A name is made of lower-case letters, digits and hyphens, and starts with a letter or digit." : invalid.validationMessage);
    invalid.focus();
    return null;
  }
  const parsed = parsePairs(form.elements.data.value);
  if (parsed.problems.length > 0) {
    showError(`The examples are not clear: ${describePairs(parsed)}.`);
    return null;
  }
  if (parsed.pairs.length > MOST_PAIRS) {
    showError(`At most ${integer(MOST_PAIRS)} examples at once; feed the rest on the kernel's own page.`);
    return null;
  }
  const body = { domain: form.elements.domain.value.trim(), experiences: parsed.pairs, idempotency_key: idempotencyKey };
  if (form.elements.name.value.trim()) body.name = form.elements.name.value.trim();
  if (form.elements.preset.value) body.preset = form.elements.preset.value;
  return body;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  showError("");
  const body = spawnBody();
  if (!body) return;
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const { kernel } = await api.post("/olympus/kernels/spawn", body);
    idempotencyKey = freshKey();
    announce(`Kernel ${kernel.god_name} was spawned`);
    location.assign(kernelPath(kernel.kernel_id));
  } catch (error) {
    showError(`It was not spawned: ${error.message}`);
    button.disabled = false;
  }
});

form.elements.data.addEventListener("input", throttle(() => {
  byId("spawn-data-count").textContent = describePairs(parsePairs(form.elements.data.value));
}, 400));

const renderSoon = throttle(render, 250);
const refreshSoon = throttle(refresh, 1500);
live.on("kernel.metric", (data) => (mergeEvent(kernels, data) ? renderSoon() : refreshSoon()));
live.on("kernel.state", (data) => {
  announce(`A kernel is ${data.state}`);
  refreshSoon();
});
keepFresh(refresh);
