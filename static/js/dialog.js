/* A question before something that is not easily taken back. */

import { h } from "./dom.js";

/** Ask; resolves to {reason} when confirmed and to null otherwise.

    `text`: what it means; `notes`: further texts or elements; `action`: the word on the button; `reason`: "required",
    "optional" or null. */
export function confirmed({ title, text, notes = [], action, danger = false, reason = null }) {
  const field = reason === null ? null : h("input", { id: "confirm-reason", maxlength: 1000, required: reason === "required", autofocus: true });
  const cancel = h("button", { class: "button", type: "button", autofocus: field === null }, "Cancel");
  const dialog = h("dialog", { class: "dialog", "aria-labelledby": "confirm-title" },
    h("form", { method: "dialog", class: "stack" },
      h("h2", { id: "confirm-title" }, title),
      text ? h("p", {}, text) : null,
      notes.map((note) => (typeof note === "string" ? h("p", {}, note) : note)),
      field ? h("div", { class: "field" }, h("label", { for: "confirm-reason" }, "Reason ", reason === "optional" ? h("span", { class: "optional" }, "optional, goes to the audit log") : null), field) : null,
      h("p", { class: "button-row" }, cancel, h("button", { class: "button", value: "yes", dataset: { kind: danger ? "danger" : "primary" } }, action))));
  cancel.addEventListener("click", () => dialog.close("cancel"));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? { reason: field?.value.trim() ?? "" } : null);
    });
  });
}
