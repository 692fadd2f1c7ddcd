/* A kernel's measurements over its life: columns of equal length, fetched once and then by what is new.

   Never more rows than a view has room for: when there are more, older neighbours are merged into their mean, as the
   server's own summaries do (a row speaks for all steps since the row before it). */

import { api } from "./api.js";

const COLUMNS = ["loss", "holdout_loss", "baseline_loss", "phi", "kappa", "basin_drift", "step_ms"];
export const VIEW_POINTS = 2000;

export class Metrics {
  #path;
  #since = null;
  #busy = null;
  #points;

  /** `columns`: names of what is fetched; `points`: at most so many rows are kept. */
  constructor(path, { columns = COLUMNS, points = VIEW_POINTS } = {}) {
    this.#path = path;
    this.#points = points;
    this.columns = Object.fromEntries(["step", ...columns].map((name) => [name, []]));
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

  /** What the server tells after the step `since` (null: of the whole life), kept by nobody. */
  rows(since, signal) {
    const names = Object.keys(this.columns).slice(1); // the steps come unasked
    const query = since === null ? "" : `&since=${since}`;
    return api.get(`${this.#path}?max_points=${this.#points}${query}&columns=${names.join(",")}`, signal);
  }

  async #fetch() {
    const whole = this.#since === null;
    const page = await this.rows(this.#since);
    if (page.next_since !== null && page.next_since !== undefined) this.#since = page.next_since;
    for (const name of Object.keys(this.columns)) {
      const values = page[name];
      this.columns[name] = whole ? values : this.columns[name].concat(values);
    }
    while (this.length > this.#points) this.columns = merged(this.columns, Math.ceil(this.#points / 2));
    return whole || page.step.length > 0;
  }

  /** The newest measured value of a column, or null. */
  last(name) {
    const values = this.columns[name];
    for (let index = values.length - 1; index >= 0; index -= 1) if (values[index] !== null) return values[index];
    return null;
  }
}

/** `columns` with the oldest `rows` rows merged two by two. */
export function merged(columns, rows) {
  const pairs = Math.floor(Math.min(rows, columns.step.length) / 2);
  return Object.fromEntries(Object.entries(columns).map(([name, values]) => {
    const head = Array.from({ length: pairs }, (_, index) => both(name, values[2 * index], values[2 * index + 1]));
    return [name, head.concat(values.slice(2 * pairs))];
  }));
}

/** One row for two: at the later step, the mean of what was measured. */
function both(name, first, second) {
  if (name === "step" || first === null) return second;
  return second === null ? first : (first + second) / 2;
}
