// The list of conversations, and what a search finds in them.

import { element } from "./markdown.js";

const DAY = 24 * 3600 * 1000;
const LEAD = 28; // Characters before what was found, so that it can be seen in two short lines.

function age(date) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (date >= today) return "Today";
  if (date >= today - DAY) return "Yesterday";
  if (date >= today - 7 * DAY) return "This week";
  return "Earlier";
}

export function when(text) {
  const date = new Date(text);
  return date >= new Date().setHours(0, 0, 0, 0)
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString([], { month: "short", day: "numeric" });
}

export function sessionList(sessions, current, more) {
  if (!sessions.length)
    return [element("p", { className: "empty" }, "Your conversations will be here.")];
  const groups = new Map();
  for (const session of sessions) {
    const name = age(new Date(session.updated_at));
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(entry(session, current));
  }
  const nodes = [...groups].flatMap(([name, entries]) => [
    element("h2", {}, name),
    element("ul", {}, ...entries),
  ]);
  if (more)
    nodes.push(
      element("button", { type: "button", className: "more", onclick: more }, "Show more"),
    );
  return nodes;
}

function entry(session, current) {
  const link = element(
    "a",
    { href: `/s/${session.session_uuid}`, className: "entry", title: session.title },
    element("span", { className: "entry-title" }, session.title),
    element("time", { dateTime: session.updated_at }, when(session.updated_at)),
  );
  if (session.session_uuid === current) link.setAttribute("aria-current", "page");
  return element("li", {}, link);
}

export function hitList(hits) {
  if (!hits.length) return [element("p", { className: "empty" }, "Nothing was found.")];
  const entries = hits.map((hit) =>
    element(
      "li",
      {},
      element(
        "a",
        { href: `/s/${hit.session_uuid}#${hit.message_id}`, className: "entry hit" },
        element("span", { className: "entry-title" }, hit.session_title),
        element("time", { dateTime: hit.created_at }, when(hit.created_at)),
        element("span", { className: "snippet" }, ...marked(hit.snippet)),
      ),
    ),
  );
  const words = hits.length === 1 ? "1 message" : `${hits.length} messages`;
  return [element("h2", { role: "status" }, words), element("ul", {}, ...entries)];
}

// The service escapes snippets; this reads them back without trusting that it did.
function marked(snippet) {
  const parts = snippet.split(/<mark>(.*?)<\/mark>/s).map(plain);
  if (parts.length > 1 && parts[0].length > LEAD)
    parts[0] = `…${parts[0].slice(-LEAD).replace(/^\S*\s+/, "")}`;
  return parts.map((text, index) => (index % 2 ? element("mark", {}, text) : text));
}

function plain(text) {
  return text
    .replace(
      /&(lt|gt|quot|#39|#x27|amp);/g,
      (_, name) => ({ lt: "<", gt: ">", quot: '"', amp: "&" })[name] ?? "'",
    )
    .replace(/\*\*|`|^(?:>|#+) /gm, "");
}
