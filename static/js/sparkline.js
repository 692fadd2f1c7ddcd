/* A small line over time, drawn as SVG: the last hour at a glance. The words and the table beside it are the page's. */

import { h, s } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 96;
const GAP_SECONDS = 30; // longer silence is a gap in the line

/** The least "round" number not below `value`: 1, 2, 2.5 or 5 times a power of ten, or of 1024 for bytes. */
export function ceiling(value, base = 10) {
  if (!(value > 0)) return 1;
  const power = base ** Math.floor(Math.log(value) / Math.log(base));
  const steps = base === 10 ? [1, 2, 2.5, 5, 10] : [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
  return power * steps.find((step) => step * power >= value * 0.999);
}

function path(times, values, from, to, top) {
  const x = (time) => (WIDTH * (time - from)) / (to - from);
  const y = (value) => HEIGHT - (HEIGHT * Math.min(value, top)) / top;
  let text = "";
  let pen = null;
  for (let index = 0; index < times.length; index += 1) {
    if (values[index] === null || times[index] < from) continue;
    text += `${pen !== null && times[index] - pen < GAP_SECONDS ? "L" : "M"}${x(times[index]).toFixed(1)} ${y(values[index]).toFixed(1)}`;
    pen = times[index];
  }
  return text;
}

const SHORTEST_SPAN = 60;

/** "an hour ago", or since when there are samples. */
function since(seconds, span) {
  if (seconds >= span) return "an hour ago";
  return seconds < 90 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;
}

export class Sparkline {
  #box;
  #options;

  /** `options`: {title, format, token, span (seconds), base, floor (least top)}; `box`: a figure. */
  constructor(box, options) {
    this.#box = box;
    this.#options = { span: 3600, base: 10, floor: 0, ...options };
  }

  /** Show the samples up to `now`; `summary` is the sentence below. */
  show(times, values, now, summary) {
    const { title, format, token, span, base, floor } = this.#options;
    const top = ceiling(Math.max(floor, ...values.filter((value) => value !== null), 0), base);
    const shown = Math.min(span, Math.max(SHORTEST_SPAN, now - (times[0] ?? now)));
    const line = path(times, values, now - shown, now, top);
    const newest = values.at(-1);
    const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
      [0.25, 0.5, 0.75].map((share) => s("line", { class: "spark-grid", x1: 0, x2: WIDTH, y1: HEIGHT * share, y2: HEIGHT * share })),
      s("path", { class: "spark-line", d: line }));
    drawing.style.color = `var(${token})`;
    this.#box.replaceChildren(
      h("figcaption", {}, h("span", { class: "spark-title" }, title), h("span", { class: "spark-now" }, newest === undefined || newest === null ? "–" : format(newest))),
      h("div", { class: "spark-plot" }, drawing, h("span", { class: "spark-top hint" }, format(top)), h("span", { class: "spark-zero hint" }, format(0))),
      h("div", { class: "spark-axis hint", "aria-hidden": "true" }, h("span", {}, since(shown, span)), h("span", {}, "now")),
      h("p", { class: "hint spark-words" }, summary));
  }
}
