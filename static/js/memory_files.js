/* The history as a file: which address downloads it, and what became of one that was brought. */

import { byId, h } from "./dom.js";
import { api } from "./api.js";
import { integer } from "./format.js";

const TYPE = "application/x-ndjson";
const BAD_SHOWN = 5;

function point() {
  const query = new URLSearchParams({ format: byId("export-form").elements.format.value });
  if (byId("export-domain").value) query.set("domain", byId("export-domain").value);
  byId("export-link").href = `/olympus/history/export?${query}`;
}

function report({ imported, known, deleted, bad_lines: count, bad }) {
  const more = [known ? `${integer(known)} known already` : "", deleted ? `${integer(deleted)} deleted here before` : "", count ? `${integer(count)} that cannot be used` : ""].filter(Boolean);
  return [
    h("p", { class: "notice", dataset: { tone: count ? "warn" : "good" } }, `${integer(imported)} ${imported === 1 ? "experience was" : "experiences were"} added${more.length ? `; ${more.join(", ")}` : ""}.`),
    count ? h("ul", { class: "hint" }, bad.slice(0, BAD_SHOWN).map(({ line, reason }) => h("li", {}, `Line ${integer(line)}: ${reason}`))) : "",
  ];
}

/** Wire both forms; `changed` is called after an import. */
export function wireFiles(changed) {
  byId("export-form").addEventListener("change", point);
  point();
  const form = byId("import-form");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    const domain = byId("import-domain").value.trim();
    button.disabled = true;
    try {
      const query = domain ? `?domain=${encodeURIComponent(domain)}` : "";
      byId("import-result").replaceChildren(...report(await api.upload(`/olympus/history/import${query}`, byId("import-file").files[0], TYPE)));
      form.reset();
      await changed();
    } catch (error) {
      byId("import-result").replaceChildren(h("p", { class: "notice", dataset: { tone: "bad" } }, `Nothing was imported: ${error.message}`));
    } finally {
      button.disabled = false;
    }
  });
}

/** Offer `domains` for the export. */
export function renderExport(names) {
  const select = byId("export-domain");
  const chosen = select.value;
  select.replaceChildren(h("option", { value: "" }, "everything"), ...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
  point();
}
