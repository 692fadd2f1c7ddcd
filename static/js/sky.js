/* The chart of all kernels: how much of the baseline's loss each has removed (right is better) against its Φ (up).

   Not decoration: the shaded corner is where two of the three conditions of convergence hold, and each path is what
   the kernel went through. A straight line leads from parent to child, a dotted one between kernels whose domains'
   texts lie near each other. What is not measured yet waits in a lane of its own instead of standing at 0. The tables
   beside it say the same in words. */

import { h, replace, s } from "./dom.js";
import { isNumber } from "./format.js";
import { kernelPath } from "./kernel_view.js";

const WORST_RATIO = 1.3; // held-out loss over baseline at the left edge; what is worse stands at the edge
const PHI_THRESHOLD = 0.7; // the specification's
const LANE = 30;
const MARGIN = { top: 14, right: 14, bottom: 44, left: 44 };

export class Sky {
  #box;
  #kernels = [];
  #trails = new Map();
  #relations = [];
  #width = 0;

  constructor(box) {
    this.#box = box;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width !== this.#width && width > 0) {
        this.#width = width;
        this.#draw();
      }
    }).observe(box);
  }

  /** `kernels`: lines of GET /olympus/kernels; `trails`: Map of kernel id to [{ratio, phi}]; `relations`: see
      `relationsOf`. */
  show(kernels, trails, relations) {
    this.#kernels = kernels;
    this.#trails = trails;
    this.#relations = relations;
    if (this.#width > 0) this.#draw();
  }

  #draw() {
    const height = this.#width < 520 ? 290 : 350;
    const signature = [this.#width, this.#kernels.map((k) => [k.kernel_id, k.state, k.holdout_loss, k.phi, this.#trails.get(k.kernel_id)?.length]), this.#relations.length];
    replace(this.#box, signature, () => this.#picture(height));
  }

  #picture(height) {
    const scale = makeScale(this.#width, height);
    const placed = place(this.#kernels, scale);
    const picture = s("svg", { viewBox: `0 0 ${this.#width} ${height}`, role: "group", "aria-label": "Chart of all kernels; the table below holds the same numbers" },
      this.#ground(scale), ...this.#axes(scale),
      s("g", { "aria-hidden": "true" }, this.#kernels.map((kernel) => this.#trail(kernel, scale)), edges(placed, this.#relations)),
      ...placed.map((item) => this.#kernel(item)));
    if (this.#kernels.length > 0) return picture;
    return [picture, h("div", { class: "sky-empty" }, h("p", {}, "No kernel yet. The first one appears here when it is spawned."), h("a", { class: "button", href: "/kernels#spawn" }, "Spawn a kernel"))];
  }

  #ground(scale) {
    const dots = [];
    for (let ratio = 0; ratio <= 1.25; ratio += 0.25) {
      for (let phi = 0; phi <= 1; phi += 0.1) dots.push(s("circle", { class: "grid-dot", cx: scale.x(ratio), cy: scale.y(phi), r: 0.9 }));
    }
    const gate = scale.x(1);
    return s("g", { "aria-hidden": "true" },
      s("rect", { class: "goal", x: gate, y: scale.y(1), width: scale.right - gate, height: scale.y(PHI_THRESHOLD) - scale.y(1), rx: 3 }), ...dots);
  }

  #axes(scale) {
    const gate = scale.x(1);
    const line = scale.y(PHI_THRESHOLD);
    const narrow = scale.right < 480;
    return [
      s("path", { class: "gate", d: `M${gate} ${scale.top}V${scale.bottom}M${scale.left} ${line}H${scale.right}` }),
      s("path", { class: "frame", d: `M${scale.left} ${scale.bottom}H${scale.right}` }),
      ...[0, 0.25, 0.5, 0.75, 1].map((phi) => s("text", { x: scale.left - 8, y: scale.y(phi) + 4, "text-anchor": "end" }, phi === 0 || phi === 1 ? String(phi) : phi.toFixed(2))),
      s("text", { x: 8, y: scale.y(0.875) + 4 }, "Φ"),
      s("text", { x: scale.right - 6, y: line + 15, "text-anchor": "end" }, `Φ ${PHI_THRESHOLD}`),
      s("text", { x: scale.left, y: scale.bottom + 20 }, "worse"),
      s("text", { x: gate, y: scale.bottom + 20, "text-anchor": "middle" }, narrow ? "baseline" : "as good as the baseline"),
      s("text", { x: scale.right, y: scale.bottom + 20, "text-anchor": "end" }, narrow ? "better →" : "predicts unseen answers better →"),
    ];
  }

  #trail(kernel, scale) {
    const points = (this.#trails.get(kernel.kernel_id) ?? []).map((point) => `${scale.x(point.ratio).toFixed(1)} ${(point.phi === null ? scale.lane : scale.y(point.phi)).toFixed(1)}`);
    return points.length > 1 ? s("path", { class: "trail", d: `M${points.join("L")}` }) : null;
  }

  #kernel({ kernel, x, y, radius, label }) {
    return s("a", { href: kernelPath(kernel.kernel_id), "aria-label": `${label.text}: ${kernel.state}, step ${kernel.step}`, dataset: { state: kernel.state } },
      s("circle", { class: "halo", cx: x, cy: y, r: radius + 4 }),
      s("circle", { class: "body", cx: x, cy: y, r: radius }),
      s("circle", { cx: x, cy: y, r: 14, fill: "transparent" }),
      s("text", { class: label.free ? "label" : "label crowded", x: label.x, y: label.y + 4, "text-anchor": label.anchor }, label.text));
  }
}

function edges(placed, relations) {
  const spots = new Map(placed.map((item) => [item.kernel.kernel_id, item]));
  return relations.map(({ from, to, kind }) => {
    const [a, b] = [spots.get(from), spots.get(to)];
    return a && b ? s("path", { class: "edge", "data-kind": kind, d: `M${a.x.toFixed(1)} ${a.y.toFixed(1)}L${b.x.toFixed(1)} ${b.y.toFixed(1)}` }) : null;
  });
}

function makeScale(width, height) {
  const left = MARGIN.left;
  const right = width - MARGIN.right;
  const top = MARGIN.top;
  const bottom = height - MARGIN.bottom;
  const floor = bottom - LANE; // Φ = 0; the lane below it holds what has no Φ yet
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  return {
    left, right, top, bottom,
    lane: bottom - LANE / 2,
    x: (ratio) => left + 16 + (1 - clamp(ratio, 0, WORST_RATIO) / WORST_RATIO) * (right - left - 32),
    y: (phi) => floor - clamp(phi, 0, 1) * (floor - top),
  };
}

/** Where each kernel and its label stand; those without numbers line up in the lane. */
function place(kernels, scale) {
  const taken = [];
  let slot = 0;
  return kernels.map((kernel) => {
    const ratio = ratioOf(kernel.holdout_loss, kernel.baseline_loss);
    const phi = isNumber(kernel.phi) ? kernel.phi : null;
    const x = Math.min(ratio === null ? scale.left + 20 + 130 * slot++ : scale.x(ratio), scale.right - 12);
    const y = phi === null ? scale.lane : scale.y(phi);
    const waiting = ratio === null ? ", nothing measured yet" : phi === null ? ", Φ not measured yet" : "";
    const radius = 5 + Math.min(4, Math.log10(1 + kernel.step));
    return { kernel, x, y, radius, label: placeLabel(kernel.god_name + waiting, x, y, radius, scale, taken) };
  });
}

/** A spot beside the body where the label covers no other label: right or left, then lower and higher. */
function placeLabel(text, x, y, radius, scale, taken) {
  const width = 7.6 * text.length; // wide enough for the fonts in use; a guess only moves a label
  const spots = [0, 16, -16, 32].flatMap((shift) => [
    { text, anchor: "start", x: x + radius + 6, y: y + shift, left: x + radius + 6 },
    { text, anchor: "end", x: x - radius - 6, y: y + shift, left: x - radius - 6 - width },
  ]);
  const inside = (spot) => spot.left >= scale.left && spot.left + width <= scale.right + 10;
  const free = (spot) => taken.every((other) => spot.left + width < other.left || other.left + other.width < spot.left || Math.abs(spot.y - other.y) > 14);
  const found = spots.find((candidate) => inside(candidate) && free(candidate));
  if (!found) return { ...(spots.find(inside) ?? spots[0]), free: false }; // shown while it is pointed at
  taken.push({ left: found.left, width, y: found.y });
  return { ...found, free: true };
}

/** Who belongs together, from GET /olympus/lineage: [{from, to, kind, distance, inherited}]. Of the domains only the
    nearest neighbour of each is told: all pairs would be a cloud. */
export function relationsOf({ nodes, edges: lines, domain_distances: distances }) {
  const descent = lines.filter((line) => line.parent_exists).map((line) => ({ from: line.parent, to: line.child, kind: "parent", inherited: line.inherited, distance: line.basin_distance }));
  const first = new Map();
  for (const node of nodes) if (!first.has(node.domain)) first.set(node.domain, node.kernel_id);
  const nearest = new Map();
  for (const { domains, distance } of distances) {
    const [one, other] = domains;
    if (!first.has(one) || !first.has(other)) continue;
    const pair = { one, other, distance };
    for (const domain of domains) if (!(nearest.get(domain)?.distance <= distance)) nearest.set(domain, pair);
  }
  const pairs = [...new Set(nearest.values())].map(({ one, other, distance }) => ({ from: first.get(one), to: first.get(other), kind: "near", inherited: false, distance }));
  return [...descent, ...pairs];
}

export function ratioOf(holdout, baseline) {
  return isNumber(holdout) && isNumber(baseline) && baseline > 0 ? holdout / baseline : null;
}

export const TRAIL_COLUMNS = ["holdout_loss", "baseline_loss", "phi"];

/** Turn the columns of /metrics into a path: a point at each examination, with the newest Φ until then (or null). */
export function trailOf(metrics) {
  const points = [];
  let phi = null;
  for (let index = 0; index < metrics.step.length; index += 1) {
    const ratio = ratioOf(metrics.holdout_loss[index], metrics.baseline_loss[index]);
    phi = isNumber(metrics.phi[index]) ? metrics.phi[index] : phi;
    if (ratio !== null) points.push({ ratio, phi });
  }
  return points;
}
