/* The form that spawns a kernel. */

import { announce, byId } from "./dom.js";
import { api } from "./api.js";
import { integer } from "./format.js";
import { throttle } from "./shell.js";
import { EXAMPLE_DOMAIN, exampleText } from "./example_pairs.js";
import { kernelPath } from "./kernel_view.js";
import { describePairs, MOST_PAIRS, parsePairs } from "./pairs.js";

const form = byId("spawn-form");
let idempotencyKey = freshKey();

function freshKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
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

function count() {
  byId("spawn-data-count").textContent = describePairs(parsePairs(form.elements.data.value));
}

/** Fill in the example that ships with the page. */
function fillExample() {
  form.elements.domain.value ||= EXAMPLE_DOMAIN;
  form.elements.data.value = exampleText();
  document.querySelector("input[name=preset][value=nano]").checked = true;
  count();
  announce(byId("spawn-data-count").textContent);
}

form.elements.data.addEventListener("input", throttle(count, 400));
byId("spawn-example").addEventListener("click", fillExample);
if (new URLSearchParams(location.search).has("example")) fillExample();
