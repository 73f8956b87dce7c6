// Calls to the backend.

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.detail ?? `the server answered with status ${status}`);
    this.status = status;
    this.reason = body?.reason ?? "";
  }
}

async function call(path, options = {}) {
  const response = await fetch(path, options);
  await raiseForStatus(response);
  return response.status === 204 ? null : response.json();
}

async function raiseForStatus(response) {
  if (response.ok) return;
  throw new ApiError(response.status, await response.json().catch(() => null));
}

function json(method, body) {
  const headers = { "content-type": "application/json" };
  return { method, headers, body: JSON.stringify(body) };
}

function query(parameters) {
  const present = Object.entries(parameters).filter(([, value]) => value);
  return new URLSearchParams(present).toString();
}

export const listSessions = (page_token = "") => call(`/api/sessions?${query({ page_token })}`);
export const getSession = (uuid) => call(`/api/sessions/${uuid}`);
export const listMessages = (uuid, page_token = "") => {
  const parameters = { page_token, newest_first: "true", page_size: 50 };
  return call(`/api/sessions/${uuid}/messages?${query(parameters)}`);
};
export const renameSession = (uuid, title) =>
  call(`/api/sessions/${uuid}`, json("PATCH", { title }));
export const deleteSession = (uuid) => call(`/api/sessions/${uuid}`, { method: "DELETE" });
export const searchMessages = (q, signal) => call(`/api/search?${query({ q })}`, { signal });

export async function getHealth() {
  try {
    return await (await fetch("/db-health", { cache: "no-store" })).json();
  } catch {
    return { status: "unavailable", database: "unreachable" };
  }
}

// Asks a question and calls `handlers[event](data)` for each event of the answer.
export async function streamAnswer(body, handlers, signal) {
  const response = await fetch("/chat/stream", { ...json("POST", body), signal });
  await raiseForStatus(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (buffer + value).split(/\r?\n\r?\n/);
    buffer = events.pop();
    for (const event of events) dispatch(event, handlers);
  }
}

function dispatch(event, handlers) {
  let name = "message";
  const data = [];
  for (const line of event.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (data.length) handlers[name]?.(JSON.parse(data.join("\n")));
}

export function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  // Browsers offer randomUUID on https and localhost only.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
