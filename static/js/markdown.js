/* The little of Markdown that small models write, as DOM nodes: paragraphs, headings, lists, fenced code, `code` and
   **bold**. Everything is a text node; nothing a model says can become an element, a link or an attribute. */

import { h } from "./dom.js";

/** Split text into blocks. An unclosed fence is a code block already, so that streaming does not flicker. */
export function blocksOf(text) {
  const blocks = [];
  let block = null;
  for (const line of text.split("\n")) {
    const fence = line.match(/^\s*```\s*([\w+#.-]*)\s*$/);
    if (block?.kind === "code") {
      if (fence && !fence[1]) block = null;
      else block.lines.push(line);
      continue;
    }
    if (fence) {
      block = { kind: "code", language: fence[1], lines: [] };
      blocks.push(block);
      continue;
    }
    block = takeLine(line, block, blocks);
  }
  return blocks;
}

const LINE_KINDS = [
  ["heading", /^#{1,6}\s+(.*)$/],
  ["unordered", /^\s*[-*•]\s+(.*)$/],
  ["ordered", /^\s*\d{1,3}[.)]\s+(.*)$/],
];

function takeLine(line, block, blocks) {
  if (line.trim() === "") {
    // A blank line ends a paragraph; inside a list it may be the space before the next item.
    return block?.kind === "ordered" || block?.kind === "unordered" ? block : null;
  }
  const [kind, match] = LINE_KINDS.map(([name, pattern]) => [name, line.match(pattern)]).find(([, found]) => found) ?? ["paragraph", null];
  const content = match ? match[1] : line;
  if (block?.kind === kind && kind !== "heading") {
    block.lines.push(content);
    return block;
  }
  const next = { kind, lines: [content] };
  if (kind === "ordered") next.start = Number.parseInt(line, 10);
  blocks.push(next);
  return next;
}

/** `code` and **bold** inside a line. */
function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).filter(Boolean).map((part) => {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) return h("code", {}, part.slice(1, -1));
    if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) return h("strong", {}, part.slice(2, -2));
    return part;
  });
}

function element(block) {
  const text = block.lines.join("\n");
  if (block.kind === "code") return h("pre", { tabindex: 0, "aria-label": block.language ? `Code, ${block.language}` : "Code" }, h("code", {}, text));
  if (block.kind === "heading") return h("h3", {}, inline(text));
  if (block.kind === "unordered") return h("ul", {}, block.lines.map((line) => h("li", {}, inline(line))));
  if (block.kind === "ordered") return h("ol", { start: block.start }, block.lines.map((line) => h("li", {}, inline(line))));
  return h("p", {}, inline(text));
}

/** Show `text` in `parent`; blocks that did not change keep their elements (selection survives streaming). */
export function renderText(parent, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    const signature = JSON.stringify(block);
    const old = parent.children[index];
    if (old?.signature === signature) return;
    const fresh = element(block);
    fresh.signature = signature;
    if (old) old.replaceWith(fresh);
    else parent.append(fresh);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}
