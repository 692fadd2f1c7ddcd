/* How a kernel looks in a list: the same row on the overview and on the kernels' page. */

import { h, reconcile, s } from "./dom.js";
import { decimal, integer, isNumber, measured } from "./format.js";

// A shape for each state, so that colour is never the only sign. 12 x 12.
const SHAPES = {
  training: () => [s("circle", { class: "solid", cx: 6, cy: 6, r: 5 })],
  converged: () => [s("path", { class: "solid", d: "M6 0l1.8 4.2L12 6 7.8 7.8 6 12 4.2 7.8 0 6l4.2-1.8z" })],
  settled: () => [s("path", { d: "M1.5 6.5l3 3 6-7" })],
  ok: () => [s("path", { d: "M1.5 6.5l3 3 6-7" })],
  paused: () => [s("path", { d: "M3.5 2v8M8.5 2v8" })],
  waiting: () => [s("path", { d: "M2 6h.1M6 6h.1M10 6h.1" })],
  queued: () => [s("circle", { cx: 6, cy: 6, r: 4.5, "stroke-dasharray": "2 3" })],
  stopped: () => [s("rect", { x: 2, y: 2, width: 8, height: 8 })],
  stalled: () => [s("path", { d: "M6 1v6M6 10.5v.5" })],
  failed: () => [s("path", { d: "M2 2l8 8M10 2l-8 8" })],
};

/** The mark and the word for a state. */
export function stateBadge(state, text = state) {
  const shape = SHAPES[state] ?? SHAPES.queued;
  return h("span", { class: "state", dataset: { state } },
    s("svg", { class: "state-mark", viewBox: "0 0 12 12", "aria-hidden": "true" }, ...shape()), text);
}

export function kernelPath(id) {
  return `/kernels/${encodeURIComponent(id)}`;
}

/** The six columns of a line of GET /olympus/kernels, and with `choosing` a box to compare it. */
function row(kernel, choosing) {
  const reason = kernel.state_reason || "the next examination has not come yet";
  const cell = (label, value) => h("td", { class: "num", "data-label": label }, measured(value, decimal, reason));
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: kernelPath(kernel.kernel_id) }, kernel.god_name), h("span", { class: "sub" }, domainText(kernel.domain))),
    h("td", { "data-label": "State" }, stateBadge(kernel.state, stateText(kernel))),
    h("td", { class: "num", "data-label": "Step" }, integer(kernel.step)),
    cell("Held-out loss", kernel.holdout_loss), cell("Baseline", kernel.baseline_loss), cell("Φ", kernel.phi),
    choosing ? h("td", { class: "choose", "data-label": "Compare" }, h("input", {
      type: "checkbox", checked: kernel.chosen, disabled: !kernel.chosen && !kernel.room, "aria-label": `Compare ${kernel.god_name}, ${kernel.kernel_id}`,
      onchange: (event) => choosing.choose(kernel.kernel_id, event.currentTarget.checked),
    })) : null);
}

/** The state, with the place in the queue when it stands in one. */
export function stateText(kernel) {
  return kernel.state === "queued" && isNumber(kernel.queue_position) ? `queued, number ${kernel.queue_position + 1}` : kernel.state;
}

export function domainText(domain) {
  return domain === "*" ? "every domain" : domain;
}

/** Only what a row shows, so that other changes do not redraw it. */
function visible(kernel) {
  const { kernel_id, god_name, domain, state, state_reason, queue_position, step, holdout_loss, baseline_loss, phi } = kernel;
  return { kernel_id, god_name, domain, state, state_reason, queue_position, step, holdout_loss, baseline_loss, phi };
}

/** Fill `table`'s body with one row per kernel. `choosing`: {chosen: Set of ids, room, choose(id, on)} or null. */
export function renderKernels(table, kernels, emptyText, choosing = null) {
  const body = table.tBodies[0];
  table.tHead.hidden = kernels.length === 0;
  if (kernels.length === 0) {
    body.replaceChildren(h("tr", {}, h("td", { colspan: choosing ? 7 : 6, class: "empty wide" }, emptyText)));
    return;
  }
  const items = kernels.map((kernel) => (choosing ? { ...visible(kernel), chosen: choosing.chosen.has(kernel.kernel_id), room: choosing.room } : visible(kernel)));
  const focused = document.activeElement?.getAttribute("aria-label");
  reconcile(body, items, (kernel) => kernel.kernel_id, (kernel) => row(kernel, choosing));
  if (choosing && focused && !document.activeElement?.closest("table")) refocus(body, focused);
}

/** A row that was drawn anew while its box had the focus gets it back. */
function refocus(body, label) {
  for (const box of body.querySelectorAll("input")) if (box.getAttribute("aria-label") === label) box.focus({ preventScroll: true });
}

/** Put a "kernel.metric" or "kernel.state" event into the list's object; returns false when it is unknown. */
export function mergeEvent(kernels, data) {
  const kernel = kernels.find((item) => item.kernel_id === data.kernel_id);
  if (!kernel) return false;
  if (data.state) kernel.state = data.state;
  if (data.reason !== undefined) kernel.state_reason = data.reason;
  for (const name of ["step", "loss", "holdout_loss", "baseline_loss", "phi"]) if (isNumber(data[name])) kernel[name] = data[name];
  return true;
}
