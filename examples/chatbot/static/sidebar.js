// The list of conversations and the results of a search.

import { element, emptyNotice } from "./dom.js";

const DAY_MS = 24 * 3600 * 1000;
// Characters before the first match, so that the match is visible in two short lines.
const MAX_LEAD_CHARS = 28;
const ENTITIES = { lt: "<", gt: ">", quot: '"', amp: "&" };

export function sessionList(sessions, currentUuid, loadMore) {
  if (!sessions.length) return [emptyNotice("Your conversations will appear here.")];
  const groups = new Map();
  for (const session of sessions) {
    const name = ageGroup(new Date(session.updated_at));
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(sessionEntry(session, currentUuid));
  }
  const nodes = [...groups].flatMap(([name, entries]) => [
    element("h2", {}, name),
    element("ul", {}, ...entries),
  ]);
  if (loadMore) {
    const properties = { type: "button", className: "load-more", onclick: loadMore };
    nodes.push(element("button", properties, "Show more"));
  }
  return nodes;
}

function ageGroup(date) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (date >= today) return "Today";
  if (date >= today - DAY_MS) return "Yesterday";
  if (date >= today - 7 * DAY_MS) return "This week";
  return "Earlier";
}

function sessionEntry(session, currentUuid) {
  const link = element(
    "a",
    { href: `/s/${session.session_uuid}`, className: "entry", title: session.title },
    element("span", { className: "entry-title" }, session.title),
    time(session.updated_at),
  );
  if (session.session_uuid === currentUuid) link.setAttribute("aria-current", "page");
  return element("li", {}, link);
}

export function hitList(hits) {
  if (!hits.length) return [emptyNotice("No messages match.")];
  const count = hits.length === 1 ? "1 message" : `${hits.length} messages`;
  return [element("h2", { role: "status" }, count), element("ul", {}, ...hits.map(hitEntry))];
}

function hitEntry(hit) {
  const link = element(
    "a",
    { href: `/s/${hit.session_uuid}#${hit.message_id}`, className: "entry hit" },
    element("span", { className: "entry-title" }, hit.session_title),
    time(hit.created_at),
    element("span", { className: "snippet" }, ...highlighted(hit.snippet)),
  );
  return element("li", {}, link);
}

function time(timestamp) {
  const date = new Date(timestamp);
  const text =
    date >= new Date().setHours(0, 0, 0, 0)
      ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
      : date.toLocaleDateString([], { month: "short", day: "numeric" });
  return element("time", { dateTime: timestamp }, text);
}

// The service escapes snippets. They become text nodes here, so the page does not depend on that.
function highlighted(snippet) {
  const parts = snippet.split(/<mark>(.*?)<\/mark>/s).map(plainText);
  if (parts.length > 1 && parts[0].length > MAX_LEAD_CHARS) {
    parts[0] = `…${parts[0].slice(-MAX_LEAD_CHARS).replace(/^\S*\s+/, "")}`;
  }
  return parts.map((text, index) => (index % 2 ? element("mark", {}, text) : text));
}

function plainText(html) {
  return html
    .replace(/&(lt|gt|quot|#39|#x27|amp);/g, (_, name) => ENTITIES[name] ?? "'")
    .replace(/\*\*|`|^(?:>|#+) /gm, "");
}
