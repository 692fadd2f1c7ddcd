/* What the training of a distillation run measured: fetched once, and then only what is new. */

import { api } from "./api.js";
import { isNumber } from "./format.js";

const PAGE = 2000; // lines that the server tells at once
const VIEW_POINTS = 2000;

export class RunMetrics {
  #path;
  #since = 0;
  #busy = null;
  #loss = new Map(); // step -> value
  #heldOut = new Map();
  ended = null; // why training ended

  constructor(runId) {
    this.#path = `/olympus/distillation/runs/${encodeURIComponent(runId)}/metrics`;
  }

  /** Fetch what is new; resolves to true when there was something. Calls made meanwhile share the request. */
  update() {
    this.#busy ??= this.#fetch().finally(() => { this.#busy = null; });
    return this.#busy;
  }

  async #fetch() {
    let some = false;
    for (;;) {
      const { metrics, next } = await api.get(`${this.#path}?since=${this.#since}`);
      this.#since = next;
      for (const line of metrics) this.#take(line);
      some ||= metrics.length > 0;
      if (metrics.length < PAGE) return some;
    }
  }

  #take(line) {
    if (isNumber(line.loss)) this.#loss.set(line.step, line.loss);
    if (isNumber(line.held_out) && line.ended === undefined) this.#heldOut.set(line.step, line.held_out);
    if (line.ended !== undefined) this.ended = line.ended;
  }

  get length() {
    return this.#loss.size + this.#heldOut.size;
  }

  /** [steps, training, held out], at most 2,000 steps: of the training loss every n-th, of the held-out all. */
  columns() {
    const all = [...new Set([...this.#loss.keys(), ...this.#heldOut.keys()])].sort((a, b) => a - b);
    const stride = Math.ceil(all.length / VIEW_POINTS);
    const steps = stride <= 1 ? all : all.filter((step, index) => index % stride === 0 || this.#heldOut.has(step));
    return [steps, steps.map((step) => this.#loss.get(step) ?? null), steps.map((step) => this.#heldOut.get(step) ?? null)];
  }

  /** {step, value} of the lowest held-out loss, the first one and the last one; null without any. */
  heldOut() {
    const steps = [...this.#heldOut.keys()].sort((a, b) => a - b);
    if (steps.length === 0) return null;
    const at = (step) => ({ step, value: this.#heldOut.get(step) });
    const best = steps.reduce((a, b) => (this.#heldOut.get(b) < this.#heldOut.get(a) ? b : a));
    return { first: at(steps[0]), best: at(best), last: at(steps.at(-1)) };
  }
}
