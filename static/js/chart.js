/* Line charts over training steps, drawn by uPlot (vendored, global `uPlot`).

   One setData per animation frame however many points arrive; colours come from the design tokens and follow the
   theme. The words and the table beside a chart are the page's business. */

import { decimal, integer, isNumber } from "./format.js";
import { h } from "./dom.js";

/** The colour a token stands for in the current theme; canvas cannot read light-dark(). */
function tokenColour(token) {
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

  /** `options`: {series: [{label, token, width, dash}], range: (u, min, max) => [low, high], height, draw(u), sync}. */
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
      if (this.#plot) this.#plot.setData(this.#data);
      else this.#make();
    });
  }

  /** A logarithmic scale shows what is still being learned late; a linear one how far it has come. */
  setLogarithmic(value) {
    this.#logarithmic = value;
    if (!this.#plot) return;
    this.#plot.destroy();
    this.#plot = null;
    this.#make();
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
      hooks: { drawClear: draw ? [draw] : [] },
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
