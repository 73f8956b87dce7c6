// Renders the subset of Markdown that models write as elements. Text is never parsed as HTML.

import { element } from "./dom.js";

const INLINE =
  /(`+)(.+?)\1|\*\*(.+?)\*\*|\*(?!\s)(.+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|\[(\d{1,2})\]/s;
const FENCE = /^\s*```/;
const HEADING = /^(#{1,6})\s+(.*)/;
const QUOTE = /^>\s?/;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)/;

// `cite(number)` returns the element for a citation like [1], or null to keep the text.
export function renderMarkdown(text, cite = () => null) {
  const lines = text.split("\n");
  const takeWhile = (predicate) => {
    const taken = [];
    while (lines.length && predicate(lines[0])) taken.push(lines.shift());
    return taken;
  };
  const blocks = [];
  while (lines.length) {
    const line = lines[0];
    if (!line.trim()) lines.shift();
    else if (FENCE.test(line)) {
      lines.shift();
      blocks.push(codeBlock(takeWhile((next) => !FENCE.test(next))));
      lines.shift();
    } else if (HEADING.test(line)) blocks.push(heading(lines.shift(), cite));
    else if (QUOTE.test(line))
      blocks.push(
        quote(
          takeWhile((next) => QUOTE.test(next)),
          cite,
        ),
      );
    else if (ITEM.test(line)) blocks.push(list(takeWhile(continuesList), cite));
    else blocks.push(paragraph(takeWhile(continuesParagraph), cite));
  }
  return blocks;
}

function continuesList(line) {
  return line.trim() && (ITEM.test(line) || /^\s{2,}/.test(line));
}

function continuesParagraph(line) {
  return line.trim() && ![FENCE, HEADING, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function codeBlock(lines) {
  return element("pre", { tabIndex: 0 }, element("code", {}, lines.join("\n")));
}

function heading(line, cite) {
  const [, marks, text] = HEADING.exec(line);
  // h1 and h2 are the page's own.
  return element(marks.length < 2 ? "h3" : "h4", {}, ...inline(text, cite));
}

function quote(lines, cite) {
  const text = lines.map((line) => line.replace(QUOTE, "")).join("\n");
  return element("blockquote", {}, ...renderMarkdown(text, cite));
}

function list(lines, cite) {
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match) items.push(match[2]);
    else items[items.length - 1] += `\n${line.trim()}`;
  }
  const children = items.map((item) => element("li", {}, ...inline(item, cite)));
  const number = ITEM.exec(lines[0])[1];
  return number
    ? element("ol", { start: Number(number) }, ...children)
    : element("ul", {}, ...children);
}

function paragraph(lines, cite) {
  return element("p", {}, ...inline(lines.join("\n"), cite));
}

function inline(text, cite) {
  const nodes = [];
  for (;;) {
    const match = INLINE.exec(text);
    if (!match) break;
    if (match.index) nodes.push(text.slice(0, match.index));
    const [whole, , code, strong, emphasis, label, url, number] = match;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else if (strong !== undefined) nodes.push(element("strong", {}, ...inline(strong, cite)));
    else if (emphasis !== undefined) nodes.push(element("em", {}, ...inline(emphasis, cite)));
    else if (url !== undefined) nodes.push(link(url, label));
    else nodes.push(cite(Number(number)) ?? whole);
    text = text.slice(match.index + whole.length);
  }
  if (text) nodes.push(text);
  return nodes;
}

function link(url, label) {
  return element("a", { href: url, rel: "noreferrer", target: "_blank" }, label);
}
