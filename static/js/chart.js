/* Line charts over training steps, drawn by uPlot (vendored, global `uPlot`).

   One setData per animation frame however many points arrive; colours come from the design tokens and follow the
   theme. Drag zooms in, Shift and drag moves, Ctrl and the wheel (or two fingers) zooms, a double click shows all; a
   view that the reader chose stays while numbers arrive. The words and the table beside a chart are the page's business. */

import { decimal, integer, isNumber } from "./format.js";
import { h } from "./dom.js";

const colours = new Map(); // token -> colour; asking the page costs a pass over its styles, and a drawing asks a dozen times
window.addEventListener("themechange", () => colours.clear());

/** The colour a token stands for in the current theme; canvas cannot read light-dark(). */
function tokenColour(token) {
  if (!colours.has(token)) colours.set(token, readColour(token));
  return colours.get(token);
}

function readColour(token) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${token})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function seriesOf({ label, token, width = 2, dash = null, points = false }) {
  return {
    label,
    stroke: () => tokenColour(token),
    width,
    dash: dash ?? undefined,
    spanGaps: true,
    points: { show: points ? undefined : false, size: 5 },
    value: (plot, value, index) => legendValue(plot.data[index], value),
  };
}

/** The value under the cursor; without a cursor, or between measurements, the newest one before. */
function legendValue(values, value) {
  const shown = isNumber(value) ? value : values?.findLast(isNumber);
  return isNumber(shown) ? decimal(shown) : "not measured";
}

/** On a logarithmic scale only powers of ten get a grid line. */
function powersOnly(plot, splits, axis) {
  if (axis === 0 || plot.scales.y.distr !== 3) return splits;
  return splits.map((value) => (Number.isInteger(Math.round(1e6 * Math.log10(value)) / 1e6) ? value : null));
}

function axisOf(extra) {
  const font = `13px ${getComputedStyle(document.body).fontFamily}`;
  return { font, stroke: () => tokenColour("--ink-soft"), grid: { stroke: () => tokenColour("--chart-grid"), width: 1, filter: powersOnly }, ticks: { show: false }, ...extra };
}

export class StepChart {
  #box;
  #options;
  #plot = null;
  #data = null;
  #frame = null;
  #logarithmic = false;
  #view = null; // {min, max} in steps, chosen by the reader; null: all

  /** `options`: {series: [{label, token, width, dash}], range: (u, min, max) => [low, high], height, draw(u), sync,
      onView(view)}. */
  constructor(box, options) {
    this.#box = box;
    this.#options = options;
    new ResizeObserver(() => this.#resize()).observe(box);
    window.addEventListener("themechange", () => this.#plot?.redraw(false, true));
  }

  /** Show [steps, ...series]; drawn in the next animation frame. */
  setData(data) {
    this.#data = data;
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      if (this.#plot) this.#update();
      else this.#make();
    });
  }

  #update() {
    if (this.#view === null) {
      this.#plot.setData(this.#data);
      return;
    }
    this.#plot.batch(() => {
      this.#plot.setData(this.#data, false);
      this.#plot.setScale("x", this.#view);
    });
  }

  /** What the reader looks at, in steps: {min, max}, or null for all. */
  get view() {
    return this.#view;
  }

  /** Show `view`, kept within the data; null shows all. Does nothing before the first data. */
  setView(view) {
    if (!this.#plot) return;
    const steps = this.#data[0];
    const [first, last] = [steps[0], steps.at(-1)];
    if (view === null || view.max - view.min >= last - first) {
      this.#plot.setScale("x", { min: first, max: last });
      return;
    }
    const min = Math.min(Math.max(view.min, first), last - (view.max - view.min));
    this.#plot.setScale("x", { min, max: min + Math.max(view.max - view.min, 2) });
  }

  /** Zoom by `factor` (below 1: closer) around the share `at` (0 left, 1 right) of the view, and move by `shift` views. */
  move({ factor = 1, shift = 0, at = 0.5 }) {
    if (!this.#plot) return;
    const { min, max } = this.#plot.scales.x;
    const width = max - min;
    const left = min + at * width * (1 - factor) + shift * width;
    this.setView({ min: left, max: left + factor * width });
  }

  /** Forget the drawing: the next data may have other series. */
  clear(series) {
    this.#plot?.destroy();
    this.#plot = null;
    this.#view = null;
    this.#options = { ...this.#options, series };
  }

  #viewed(plot) {
    const { min, max } = plot.scales.x;
    const steps = plot.data[0];
    const all = !isNumber(min) || (min <= steps[0] && max >= steps.at(-1));
    const before = this.#view;
    this.#view = all ? null : { min, max };
    if (before?.min !== this.#view?.min || before?.max !== this.#view?.max) this.#options.onView?.(this.#view);
  }

  /** Shift and drag moves what is seen; Ctrl and the wheel zooms. Plain wheels go on scrolling the page. */
  #wireMoves(plot) {
    plot.over.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const box = plot.over.getBoundingClientRect();
      this.move({ factor: event.deltaY < 0 ? 0.8 : 1.25, at: (event.clientX - box.left) / box.width });
    }, { passive: false });
    plot.over.addEventListener("mousedown", (event) => {
      if (!event.shiftKey || event.button !== 0) return;
      event.stopImmediatePropagation(); // uPlot would begin to select
      const [from, { min, max }] = [event.clientX, { ...plot.scales.x }];
      const drag = ({ clientX }) => {
        const shift = ((from - clientX) / plot.over.clientWidth) * (max - min);
        this.setView({ min: min + shift, max: max + shift });
      };
      document.addEventListener("mousemove", drag);
      document.addEventListener("mouseup", () => document.removeEventListener("mousemove", drag), { once: true });
    }, { capture: true });
  }

  /** A logarithmic scale shows what is still being learned late; a linear one how far it has come. */
  setLogarithmic(value) {
    this.#logarithmic = value;
    if (!this.#plot) return;
    this.#plot.destroy();
    this.#plot = null;
    const view = this.#view;
    this.#make();
    if (view !== null) this.setView(view);
  }

  redraw() {
    this.#plot?.redraw();
  }

  #size() {
    return { width: Math.floor(this.#box.clientWidth), height: this.#options.height };
  }

  #make() {
    this.#box.replaceChildren();
    const { series, range, draw, sync } = this.#options;
    this.#plot = new window.uPlot({
      ...this.#size(),
      padding: [10, 12, 0, 0],
      cursor: { y: false, drag: { x: true, y: false }, sync: { key: sync }, points: { size: 7 } },
      legend: { markers: { width: 2, dash: (_, index) => (index > 0 && series[index - 1].dash ? "dashed" : "solid") } },
      scales: { x: { time: false }, y: this.#logarithmic ? { distr: 3 } : { range } },
      axes: [
        axisOf({ size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? integer(tick) : "")) }),
        axisOf({ size: 48, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : String(Number(tick.toPrecision(3))))) }),
      ],
      series: [{ label: "Step", value: (plot, step) => integer(isNumber(step) ? step : plot.data[0].at(-1)) }, ...series.map(seriesOf)],
      hooks: { drawClear: draw ? [draw] : [], setScale: [(plot, key) => key === "x" && this.#viewed(plot)], ready: [(plot) => this.#wireMoves(plot)] },
    }, this.#data, this.#box);
  }

  #resize() {
    const width = Math.floor(this.#box.clientWidth);
    if (this.#plot && width > 0 && width !== this.#plot.width) this.#plot.setSize(this.#size());
  }
}

/** Draw a horizontal line at `value` and a band `low`..`high` over steps `from`..`to`, behind the series. */
export function drawGuides(plot, { value, band }) {
  const { ctx, bbox } = plot;
  const ratio = window.devicePixelRatio || 1;
  ctx.save();
  if (band) {
    const left = plot.valToPos(band.from, "x", true);
    const right = plot.valToPos(band.to, "x", true);
    const top = plot.valToPos(band.high, "y", true);
    const bottom = plot.valToPos(band.low, "y", true);
    ctx.globalAlpha = 0.22;
    ctx.fillStyle = tokenColour("--gold");
    ctx.fillRect(left, top, right - left, Math.max(bottom - top, 2 * ratio));
    ctx.globalAlpha = 1;
  }
  const y = Math.round(plot.valToPos(value, "y", true));
  ctx.strokeStyle = tokenColour("--gold");
  ctx.lineWidth = ratio;
  ctx.setLineDash([5 * ratio, 5 * ratio]);
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.fillStyle = tokenColour("--gold");
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.font = `${12 * ratio}px ${getComputedStyle(document.body).fontFamily}`;
  ctx.fillText(`needed: ${value}`, bbox.left + 6 * ratio, y - 6 * ratio);
  ctx.restore();
}
