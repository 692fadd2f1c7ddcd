/* What the workspace did while an answer was written: counts, tokens, virtual keys and values, slots. */

import { h } from "./dom.js";
import { bytes, decimal, integer } from "./format.js";
import { traceStrip } from "./trace_strip.js";

const plural = (count, word) => `${integer(count)} ${word}${count === 1 ? "" : "s"}`;

/** `report`: `usage.workspace`; `trace`: `olympus.trace` or null. An element to unfold below the answer. */
export function insideView(report, trace) {
  const layers = Object.entries(report.norms);
  const summary = [
    plural(report.virtual_tokens, "virtual token"), layers.length > 0 ? `in ${plural(layers.length, "layer")}` : null,
    `, ${plural(report.broadcasts, "broadcast")}`, report.recollections.length > 0 ? `, ${plural(report.recollections.length, "memory").replace("memorys", "memories")}` : null,
  ].filter(Boolean).join(" ").replaceAll(" ,", ",");
  const box = h("details", { class: "inside" }, h("summary", {}, `Inside: ${summary}`));
  box.addEventListener("toggle", () => {
    if (box.children.length > 1) return; // made when it is first looked at
    box.append(h("div", { class: "inside-body" }, trace?.length ? traceStrip(trace) : null, facts(report), layers.length > 0 ? norms(layers) : null, report.slots?.length ? slots(report.slots) : null));
  });
  return box;
}

function facts(report) {
  const off = Object.entries(report.toggles).filter(([, on]) => !on).map(([name]) => name.replaceAll("_", " "));
  const rows = [
    ["Virtual keys and values", bytes(report.kv_bytes)],
    ["Brought along by the session", plural(report.session_segments, "segment")],
    ["Updates of the slots", integer(report.slot_updates)],
    ["Retrievals", integer(report.retrievals)],
    ["Remembered", report.recollections.join(", ") || "nothing"],
    ["In the cache at the end", plural(report.cache_tokens, "token")],
    report.evicted_tokens > 0 ? ["Left the cache", plural(report.evicted_tokens, "token")] : null,
    off.length > 0 ? ["Switched off", off.join(", ")] : null,
  ].filter(Boolean);
  return h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function bar(value, most) {
  const fill = h("div", { class: "meter-fill" });
  fill.style.width = `${(100 * value) / most}%`;
  return h("div", { class: "meter", "aria-hidden": "true" }, fill);
}

function norms(layers) {
  const most = Math.max(...layers.flatMap(([, pair]) => pair));
  return h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Virtual keys and values, table" }, h("table", { class: "data-table bar-table" },
    h("caption", {}, "Virtual keys and values: mean norm per hooked layer"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col" }, "Keys"), h("th", { scope: "col" }, "Values"))),
    h("tbody", {}, layers.map(([layer, pair]) => h("tr", {}, h("th", { scope: "row" }, layer), pair.map((value) => h("td", {}, h("span", { class: "bar-cell" }, h("span", {}, decimal(value, 2)), bar(value, most)))))))));
}

function slots(list) {
  const most = Math.max(...list.map((slot) => slot.share));
  return h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Slots, table" }, h("table", { class: "data-table bar-table" },
    h("caption", {}, "Slots after their last update: the share of what was seen that each claimed, its norm, how far it moved"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Slot"), h("th", { scope: "col" }, "Share"), h("th", { scope: "col", class: "num" }, "Norm"), h("th", { scope: "col", class: "num" }, "Moved"))),
    h("tbody", {}, list.map((slot, index) => h("tr", {}, h("th", { scope: "row" }, integer(index + 1)),
      h("td", {}, h("span", { class: "bar-cell" }, h("span", {}, `${decimal(100 * slot.share, 1)} %`), bar(slot.share, most))),
      h("td", { class: "num" }, decimal(slot.norm, 2)), h("td", { class: "num" }, decimal(slot.moved, 2)))))));
}
