// What the page asks of the backend.

export class Failed extends Error {
  constructor(status, body) {
    super(body?.detail ?? `the server answered with ${status}`);
    this.status = status;
    this.reason = body?.reason ?? "";
  }
}

async function call(path, options = {}) {
  const reply = await fetch(path, options);
  if (!reply.ok) throw new Failed(reply.status, await reply.json().catch(() => null));
  return reply.status === 204 ? null : reply.json();
}

const json = (method, body) => ({
  method,
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
});
const query = (values) =>
  new URLSearchParams(Object.entries(values).filter(([, value]) => value)).toString();

export const sessions = (page_token = "") => call(`/api/sessions?${query({ page_token })}`);
export const session = (uuid) => call(`/api/sessions/${uuid}`);
export const messages = (uuid, page_token = "") =>
  call(
    `/api/sessions/${uuid}/messages?${query({ page_token, newest_first: "true", page_size: 50 })}`,
  );
export const rename = (uuid, title) => call(`/api/sessions/${uuid}`, json("PATCH", { title }));
export const erase = (uuid) => call(`/api/sessions/${uuid}`, { method: "DELETE" });
export const search = (q, signal) => call(`/api/search?${query({ q })}`, { signal });

export async function health() {
  try {
    return await (await fetch("/db-health", { cache: "no-store" })).json();
  } catch {
    return { status: "unavailable", database: "unreachable" };
  }
}

// Asks a question; calls `on[event](data)` for each event of the answer.
export async function ask(body, on, signal) {
  const reply = await fetch("/chat/stream", { ...json("POST", body), signal });
  if (!reply.ok) throw new Failed(reply.status, await reply.json().catch(() => null));
  let rest = "";
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) dispatch(event, on);
  }
}

function dispatch(text, on) {
  let name = "message";
  const data = [];
  for (const line of text.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (data.length) on[name]?.(JSON.parse(data.join("\n")));
}

export function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // A page that is not on https or localhost.
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
