/* One live connection per tab to GET /olympus/stream.

   Resumes with Last-Event-ID, backs off exponentially with full jitter (0.5 to 30 s), closes while the tab is hidden,
   calls itself stale after 10 s of silence, and when it cannot connect it lets the pages poll instead. */

import { readEvents } from "./sse.js";

const FIRST_DELAY = 500;
const LONGEST_DELAY = 30_000;
const STALE_AFTER = 10_000;
const DEAD_AFTER = 45_000;
const POLL_EVERY = 5_000;
const FAILURES_UNTIL_POLLING = 3;
const HIDDEN_GRACE = 5_000;

/** Milliseconds to wait before attempt number `attempt` (1, 2, ...): full jitter, as in the AWS architecture blog. */
export function backoff(attempt, random = Math.random) {
  const ceiling = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** attempt);
  return Math.max(FIRST_DELAY, random() * ceiling);
}

export class LiveStream {
  #url;
  #handlers = new Map();
  #lastId = null;
  #attempt = 0;
  #abort = null;
  #retryTimer = null;
  #hideTimer = null;
  #lastSeen = 0;
  #lastPoll = 0;
  #state = "connecting";

  constructor(url) {
    this.#url = url;
  }

  /** Topics of the hub, and four of our own: "state", "reset" (fetch anew), "poll" and "signed-out". */
  on(topic, handler) {
    const list = this.#handlers.get(topic) ?? [];
    list.push(handler);
    this.#handlers.set(topic, list);
    return this;
  }

  get state() {
    return this.#state;
  }

  start() {
    document.addEventListener("visibilitychange", () => this.#visibility());
    window.addEventListener("pagehide", () => this.#close("paused"));
    window.addEventListener("pageshow", (event) => event.persisted && this.#resume());
    window.addEventListener("online", () => this.#state !== "live" && this.#resume());
    setInterval(() => this.#watch(), 1000);
    this.#connect();
  }

  async #connect() {
    clearTimeout(this.#retryTimer);
    const abort = new AbortController();
    this.#abort = abort;
    let wait = null;
    try {
      const headers = { Accept: "text/event-stream" };
      if (this.#lastId !== null) headers["Last-Event-ID"] = this.#lastId;
      const response = await fetch(this.#url, { headers, signal: abort.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        this.#close("signed-out");
        this.#emit("signed-out", response.status);
        return;
      }
      if (!response.ok) {
        wait = 1000 * Number(response.headers.get("Retry-After"));
        throw new Error(`the stream answered ${response.status}`);
      }
      await this.#read(response.body);
    } catch (error) {
      if (abort.signal.aborted) return;
      console.debug("live stream:", error.message);
    }
    if (!abort.signal.aborted) this.#retry(wait);
  }

  async #read(body) {
    this.#seen();
    for await (const message of readEvents(body)) {
      this.#attempt = 0;
      this.#seen();
      if (message.id) this.#lastId = message.id;
      if (message.comment !== undefined || message.data === null) continue;
      this.#emit(message.event, JSON.parse(message.data));
    }
  }

  #seen() {
    this.#lastSeen = Date.now();
    this.#become("live");
  }

  #retry(serverWait) {
    this.#attempt += 1;
    this.#become(this.#attempt >= FAILURES_UNTIL_POLLING ? "polling" : "connecting");
    this.#retryTimer = setTimeout(() => this.#connect(), Math.max(serverWait || 0, backoff(this.#attempt)));
  }

  #watch() {
    const silent = Date.now() - this.#lastSeen;
    if (this.#state === "live" && silent > STALE_AFTER) this.#become("stale");
    if (this.#state === "stale" && silent > DEAD_AFTER) {
      this.#abort.abort();
      this.#retry(0);
    }
    const blind = this.#state === "polling" || this.#state === "stale";
    if (blind && Date.now() - this.#lastPoll > POLL_EVERY) {
      this.#lastPoll = Date.now();
      this.#emit("poll", null);
    }
  }

  #visibility() {
    clearTimeout(this.#hideTimer);
    if (document.hidden) this.#hideTimer = setTimeout(() => this.#close("paused"), HIDDEN_GRACE);
    else if (this.#state === "paused") this.#resume();
  }

  #resume() {
    if (document.hidden || this.#state === "signed-out") return;
    this.#abort?.abort();
    this.#attempt = 0;
    this.#become("connecting");
    this.#connect();
  }

  #close(state) {
    clearTimeout(this.#retryTimer);
    this.#abort?.abort();
    this.#become(state);
  }

  #become(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#emit("state", state);
  }

  #emit(topic, data) {
    for (const handler of this.#handlers.get(topic) ?? []) handler(data);
  }
}
