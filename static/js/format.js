/* Numbers and times as people read them. A value that is null was not measured: it is never shown as 0. */

import { h } from "./dom.js";

const integerFormat = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** 1,234 */
export function integer(value) {
  return integerFormat.format(value);
}

/** Three to four significant digits, never in scientific notation unless it must be. */
export function decimal(value, digits = 3) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.0005 || size >= 1e7)) return value.toExponential(1);
  if (size >= 1000) return integer(value);
  return value.toFixed(size >= 100 ? Math.min(digits, 1) : digits);
}

export function percent(value) {
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
}

export function bytes(value) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let index = 0;
  let size = value;
  while (size >= 1000 && index < units.length - 1) {
    size /= 1000;
    index += 1;
  }
  return `${index === 0 || size >= 100 ? Math.round(size) : size.toFixed(1)} ${units[index]}`;
}

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} days`;
}

/** Seconds since the epoch, from a number (seconds) or an ISO text; null when it is neither. */
export function epoch(value) {
  if (isNumber(value)) return value;
  const parsed = typeof value === "string" ? Date.parse(value) / 1000 : NaN;
  return Number.isFinite(parsed) ? parsed : null;
}

/** A <time> that says how long ago. `refreshTimes` keeps all of them true. */
export function ago(value) {
  const at = epoch(value);
  if (at === null) return missing("no time was recorded");
  const date = new Date(at * 1000);
  const element = h("time", { datetime: date.toISOString(), title: date.toLocaleString() });
  element.textContent = agoText(at);
  return element;
}

function agoText(at) {
  const seconds = Math.max(0, Date.now() / 1000 - at);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(at * 1000).toLocaleDateString();
}

export function refreshTimes(root = document) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const text = agoText(Date.parse(element.dateTime) / 1000);
    if (element.textContent !== text) element.textContent = text;
  }
}

/** What stands where a number would be, with the reason on hover and for screen readers. */
export function missing(reason, text = "not measured yet") {
  return h("span", { class: "missing", title: reason || null }, text,
    reason ? h("span", { class: "visually-hidden" }, `: ${reason}`) : null);
}

/** A formatted number, or `missing(reason)`. */
export function measured(value, format = decimal, reason = "") {
  return isNumber(value) ? h("span", { class: "value" }, format(value)) : missing(reason);
}
