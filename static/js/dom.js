/* Making and updating elements without parsing HTML: whatever comes from the server or the model is text. */

const SVG_NS = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: h("p", {class: "hint"}, "text", child). Strings become text nodes. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** An SVG element. */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG_NS, tag), props, children);
}

/** The element with this id; a missing one is a mistake in the template. */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page has no element #${id}`);
  return element;
}

/** Replace what an element holds, unless `signature` says that nothing changed (keeps focus and selection). */
export function replace(element, signature, build) {
  const text = JSON.stringify(signature);
  if (element.dataset.signature === text) return false;
  element.dataset.signature = text;
  element.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
  return true;
}

/** Keep `parent`'s children equal to `items`, in order, touching only those whose JSON changed. */
export function reconcile(parent, items, keyOf, build) {
  const old = new Map();
  for (const child of [...parent.children]) {
    if (child.dataset.key === undefined) child.remove();
    else old.set(child.dataset.key, child);
  }
  let previous = null;
  for (const item of items) {
    const key = String(keyOf(item));
    const signature = JSON.stringify(item);
    let child = old.get(key);
    if (!child || child.signature !== signature) {
      const fresh = build(item);
      fresh.dataset.key = key;
      fresh.signature = signature;
      if (child) child.replaceWith(fresh);
      child = fresh;
    }
    old.delete(key);
    const wanted = previous ? previous.nextElementSibling : parent.firstElementChild;
    if (wanted !== child) parent.insertBefore(child, wanted);
    previous = child;
  }
  for (const child of old.values()) child.remove();
}

let lastSpoken = 0;
let pendingSpeech = null;

/** Say something to screen readers, at most once in five seconds; a newer text replaces a waiting one. */
export function announce(text) {
  clearTimeout(pendingSpeech);
  const wait = Math.max(0, lastSpoken + 5000 - Date.now());
  pendingSpeech = setTimeout(() => {
    lastSpoken = Date.now();
    byId("announcer").textContent = text;
  }, wait);
}

/** A message in the corner that goes away by itself; errors stay until they are closed. */
export function toast(text, tone = "good") {
  const close = h("button", { type: "button", class: "toast-close", "aria-label": "Close this message" }, "×");
  const box = h("div", { class: "toast", dataset: { tone } }, h("span", {}, text), close);
  close.addEventListener("click", () => box.remove());
  byId("toasts").append(box);
  if (tone !== "bad") setTimeout(() => box.remove(), 6000);
}
