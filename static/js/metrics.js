/* A kernel's measurements over its life: columns of equal length, fetched once and then by what is new. */

import { api } from "./api.js";

const COLUMNS = ["step", "loss", "holdout_loss", "baseline_loss", "phi", "kappa", "basin_drift", "step_ms"];
const VIEW_POINTS = 2000;
const MOST_POINTS = 4000; // above it, the server's down-sampled view is fetched anew

export class Metrics {
  #path;
  #since = null;
  #busy = null;
  columns = Object.fromEntries(COLUMNS.map((name) => [name, []]));

  constructor(path) {
    this.#path = path;
  }

  get length() {
    return this.columns.step.length;
  }

  /** Fetch what is new; resolves to true when there was something. Calls made meanwhile share the request. */
  update() {
    this.#busy ??= this.#fetch().finally(() => { this.#busy = null; });
    return this.#busy;
  }

  /** Forget everything; the next update fetches the whole life again (after a restore, steps go back). */
  reset() {
    this.#since = null;
  }

  async #fetch() {
    const whole = this.#since === null || this.length > MOST_POINTS;
    const query = whole ? "" : `&since=${this.#since}`;
    const page = await api.get(`${this.#path}?max_points=${VIEW_POINTS}${query}`);
    if (page.next_since !== null && page.next_since !== undefined) this.#since = page.next_since;
    for (const name of COLUMNS) {
      const values = page[name];
      this.columns[name] = whole ? values : this.columns[name].concat(values);
    }
    return whole || page.step.length > 0;
  }

  /** The newest measured value of a column, or null. */
  last(name) {
    const values = this.columns[name];
    for (let index = values.length - 1; index >= 0; index -= 1) if (values[index] !== null) return values[index];
    return null;
  }
}
