// The little Markdown that models write, as elements: text is never read as HTML.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

const INLINE =
  /(`+)(.+?)\1|\*\*(.+?)\*\*|\*(?!\s)(.+?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|\[(\d{1,2})\]/s;

// `cite(number)` makes what stands for [1]; null leaves it as it is.
function inline(text, cite) {
  const nodes = [];
  for (;;) {
    const found = INLINE.exec(text);
    if (!found) break;
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, strong, emphasis, label, link, number] = found;
    if (code !== undefined) nodes.push(element("code", {}, code));
    else if (strong !== undefined) nodes.push(element("strong", {}, ...inline(strong, cite)));
    else if (emphasis !== undefined) nodes.push(element("em", {}, ...inline(emphasis, cite)));
    else if (link !== undefined)
      nodes.push(element("a", { href: link, rel: "noreferrer", target: "_blank" }, label));
    else nodes.push(cite(Number(number)) ?? whole);
    text = text.slice(found.index + whole.length);
  }
  if (text) nodes.push(text);
  return nodes;
}

const FENCE = /^\s*```/;
const HEAD = /^(#{1,6})\s+(.*)/;
const QUOTE = /^>\s?/;
const ITEM = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)/;

export function render(text, cite = () => null) {
  const lines = text.split("\n");
  const blocks = [];
  const take = (test) => {
    const taken = [];
    while (lines.length && test(lines[0])) taken.push(lines.shift());
    return taken;
  };
  while (lines.length) {
    const line = lines[0];
    const head = HEAD.exec(line);
    if (!line.trim()) lines.shift();
    else if (FENCE.test(line)) {
      lines.shift();
      const code = take((next) => !FENCE.test(next));
      lines.shift();
      blocks.push(element("pre", { tabIndex: 0 }, element("code", {}, code.join("\n"))));
    } else if (head) {
      lines.shift();
      // The page's own headings are h1 and h2.
      blocks.push(element(head[1].length < 2 ? "h3" : "h4", {}, ...inline(head[2], cite)));
    } else if (QUOTE.test(line)) {
      const quoted = take((next) => QUOTE.test(next)).map((next) => next.replace(QUOTE, ""));
      blocks.push(element("blockquote", {}, ...render(quoted.join("\n"), cite)));
    } else if (ITEM.test(line))
      blocks.push(
        list(
          take((next) => next.trim() && (ITEM.test(next) || /^\s{2,}/.test(next))),
          cite,
        ),
      );
    else
      blocks.push(
        paragraph(
          take(
            (next) => next.trim() && ![FENCE, HEAD, QUOTE, ITEM].some((other) => other.test(next)),
          ),
          cite,
        ),
      );
  }
  return blocks;
}

function paragraph(lines, cite) {
  return element("p", {}, ...inline(lines.join("\n"), cite));
}

function list(lines, cite) {
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found) items.push(found[2]);
    else items[items.length - 1] += `\n${line.trim()}`;
  }
  const number = ITEM.exec(lines[0])[1];
  const made = element(
    number ? "ol" : "ul",
    {},
    ...items.map((item) => element("li", {}, ...inline(item, cite))),
  );
  if (number) made.start = Number(number);
  return made;
}
