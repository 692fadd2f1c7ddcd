/* What every page has: the one live stream, its badge, the line about the model, the clocks. */

import { announce, byId, h, replace } from "./dom.js";
import { percent, refreshTimes } from "./format.js";
import { api, signIn } from "./api.js";
import { LiveStream } from "./stream.js";

const TOPICS = ["model", "history", "chat", "kernel.state", "kernel.metric", "kernel.checkpoint", "kernel.drift", "kernel.proposal", "cartridge", "distillation"];
if (document.body.dataset.page === "system") TOPICS.push("system");
const STATE_TEXT = {
  connecting: ["connecting", "Opening the live connection"],
  live: ["live", "Numbers arrive as they are measured"],
  stale: ["stale", "Nothing heard for ten seconds; asking again every five"],
  polling: ["polling", "No live connection; asking every five seconds"],
  paused: ["paused", "Paused while this tab is hidden"],
  "signed-out": ["signed out", "The key is missing or was revoked"],
};

/** The one live connection of this tab; pages add their own handlers. */
export const live = new LiveStream(`/olympus/stream?topics=${TOPICS.join(",")}`);

/** Run `refresh` now, after a gap in the stream, and every few seconds while there is no stream. */
export function keepFresh(refresh) {
  live.on("reset", refresh).on("poll", refresh);
  return refresh();
}

/** Let `run` be called at most once per `interval` ms, with a last call for what came meanwhile. */
export function throttle(run, interval) {
  let timer = null;
  let again = false;
  return function throttled() {
    if (timer !== null) {
      again = true;
      return;
    }
    run();
    timer = setTimeout(() => {
      timer = null;
      if (again) {
        again = false;
        throttled();
      }
    }, interval);
  };
}

let lastStage = null;

/** Show what the model is doing above the page, unless it is ready. `model`: {stage, name, detail, fraction}. */
export function showModel(model) {
  const box = byId("model-notice");
  if (lastStage !== null && lastStage !== model.stage) announce(`The model is ${model.stage}`);
  lastStage = model.stage;
  window.dispatchEvent(new CustomEvent("modelstate", { detail: model }));
  if (document.body.dataset.page === "overview" && model.stage === "loading") {
    box.hidden = true; // the overview says it larger
    return;
  }
  box.hidden = model.stage === "ready" || model.stage === "disabled";
  box.dataset.tone = model.stage === "failed" ? "bad" : "warn";
  replace(box, model, () => modelLine(model));
}

function modelLine(model) {
  if (model.stage === "failed") return [h("strong", {}, `The model ${model.name} could not be loaded. `), model.detail];
  const share = typeof model.fraction === "number" ? `, ${percent(model.fraction)}` : "";
  return [h("strong", {}, `The model ${model.name} is loading. `), `${model.detail || "starting"}${share}. Everything else works already.`];
}

live.on("state", (state) => {
  const [text, title] = STATE_TEXT[state];
  const badge = byId("live-badge");
  badge.dataset.state = state;
  badge.title = title;
  byId("live-text").textContent = text;
});
live.on("signed-out", signIn);
live.on("model", showModel);

/** The server's own summary. Every page asks for it once; the overview keeps asking. */
export async function readStatus() {
  const status = await api.get("/olympus/status");
  showModel(status.model);
  return status;
}

setInterval(refreshTimes, 5000);
live.start();
if (!["overview", "chat"].includes(document.body.dataset.page)) {
  readStatus().catch((error) => console.debug("status:", error.message));
}
