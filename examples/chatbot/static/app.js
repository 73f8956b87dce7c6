// The page: what it shows, and what happens when something is done.

import * as api from "./api.js";
import { element } from "./markdown.js";
import { hitList, sessionList } from "./sidebar.js";
import { Answer, greeting, lost, question } from "./talk.js";

const $ = (id) => document.getElementById(id);
const NEW = "New conversation";
const WHILE_AWAY = 3000; // Milliseconds between two looks at a database that does not answer; a healthy one is left in peace.

const NARROW = matchMedia("(max-width: 760px)");

const state = {
  session: null,
  sessions: null,
  unread: false,
  more: "",
  answering: null,
  away: false,
  loading: 0,
};

// --- where we are -----------------------------------------------------------------------------------------------------------

function show(title) {
  $("title").textContent = title;
  document.title = `${title} · Chatbot`;
  $("head-tools").hidden = !state.session;
}

function here() {
  return /^\/s\/([0-9a-f-]{36})$/i.exec(location.pathname)?.[1] ?? null;
}

function go(path) {
  if (path !== location.pathname + location.hash) history.pushState(null, "", path);
  return open();
}

async function open() {
  leave();
  const uuid = here();
  const turn = ++state.loading;
  drawer(false);
  state.session = null;
  show(NEW);
  drawList();
  $("talk").replaceChildren();
  if (!uuid) {
    $("talk").append(greeting(fill));
    $("question").focus({ preventScroll: true });
    return;
  }
  $("talk").setAttribute("aria-live", "off"); // What is loaded is read by whoever wants to, not announced.
  try {
    const [session, page] = await Promise.all([api.session(uuid), api.messages(uuid)]);
    if (turn !== state.loading) return;
    state.session = session;
    show(session.title);
    drawList();
    $("talk").append(...earlier(page.next_page_token), ...page.messages.reverse().map(drawn));
    land();
    seen(true);
  } catch (error) {
    if (turn !== state.loading) return;
    if (error.status === 404 || error.status === 422) $("talk").append(lost());
    else failed("The conversation cannot be read now.", open);
  } finally {
    $("talk").setAttribute("aria-live", "polite");
  }
}

// What is answered elsewhere is broken off; the backend keeps what there is of it.
function leave() {
  if (!state.answering) return;
  state.answering.abort();
  state.answering = null;
  busy(false);
}

function drawn(message) {
  const made = message.role === "user" ? question(message.content) : Answer.of(message).element;
  made.id = message.id;
  return made;
}

function earlier(token) {
  if (!token) return [];
  const button = element("button", { type: "button", className: "more" }, "Show earlier messages");
  button.onclick = async () => {
    const page = await api.messages(state.session.session_uuid, token);
    const height = $("scroll").scrollHeight;
    button.replaceWith(...earlier(page.next_page_token), ...page.messages.reverse().map(drawn));
    $("scroll").scrollTop += $("scroll").scrollHeight - height;
  };
  return [button];
}

function land() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target) {
    bottom();
    return;
  }
  target.scrollIntoView({ block: "center" });
  target.classList.add("found");
  target.addEventListener("animationend", () => target.classList.remove("found"), { once: true });
}

function bottom() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function atBottom() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

// --- asking -----------------------------------------------------------------------------------------------------------------

function fill(text) {
  $("question").value = text;
  $("ask").requestSubmit();
}

async function ask(text, message_id = api.newId()) {
  $("talk").querySelector(".greeting")?.remove();
  const asked = question(text);
  const answer = new Answer();
  $("talk").append(asked, answer.element);
  await listen({ text, message_id, asked, answer });
}

async function listen({ text, message_id, asked, answer }) {
  const body = { message: text, message_id, session_uuid: state.session?.session_uuid ?? null };
  const stop = new AbortController();
  state.answering = stop;
  busy(true);
  answer.begin([]);
  bottom();
  const place = state.loading;
  const on = {
    begin: (data) => {
      answer.begin(data.sources);
      began(data);
    },
    delta: (data) => {
      const follow = atBottom();
      answer.add(data.text);
      if (follow) requestAnimationFrame(bottom);
    },
    done: (data) => {
      answer.text = data.answer;
      answer.end(data);
      if (data.session_uuid) began(data);
      seen(data.saved);
    },
  };
  let ended = false;
  try {
    await api.ask(body, { ...on, done: (data) => ((ended = true), on.done(data)) }, stop.signal);
    if (!ended) throw new TypeError("the answer broke off");
  } catch (error) {
    if (stop.signal.aborted) answer.end({ stopped: true, saved: true });
    else {
      const again = () => {
        asked.remove();
        answer.element.remove();
        ask(text, message_id); // The same id: what was stored is not stored again.
      };
      answer.end({
        failed:
          error instanceof api.Failed
            ? `No answer: ${error.message}.`
            : "The connection broke off.",
        again,
      });
      check();
    }
  } finally {
    if (place === state.loading) {
      state.answering = null;
      busy(false);
      bottom();
    }
    loadList();
  }
}

function began({ session_uuid, title }) {
  if (!session_uuid || state.session || here()) return;
  state.session = { session_uuid, title: title ?? NEW };
  history.replaceState(null, "", `/s/${session_uuid}`);
  show(state.session.title);
}

function busy(now) {
  $("talk").setAttribute("aria-busy", String(now));
  $("send").setAttribute("aria-label", now ? "Stop the answer" : "Send");
  $("send").classList.toggle("stop", now);
  $("send")
    .querySelector("use")
    .setAttribute("href", now ? "#i-stop" : "#i-send");
}

function failed(text, again) {
  const answer = new Answer();
  answer.end({ failed: text, again: () => (answer.element.remove(), again()) });
  $("talk").append(answer.element);
  check();
}

// --- the list of conversations ----------------------------------------------------------------------------------------------

async function loadList(page_token = "") {
  try {
    const page = await api.sessions(page_token);
    state.sessions = page_token ? [...state.sessions, ...page.sessions] : page.sessions;
    state.more = page.next_page_token;
  } catch {
    state.unread = true;
    check();
  }
  drawList();
}

function drawList() {
  if ($("find-text").value.trim()) return; // What was found stands there.
  const more = state.more && (() => loadList(state.more));
  if (state.sessions)
    list(sessionList(state.sessions, here() ?? state.session?.session_uuid, more));
  else if (state.unread)
    list([element("p", { className: "empty" }, "Your conversations cannot be read now.")]);
}

// Whoever stands in the list with the keyboard stays where they are.
function list(nodes) {
  const focused =
    $("list").contains(document.activeElement) && document.activeElement.getAttribute("href");
  $("list").replaceChildren(...nodes);
  if (focused)
    $("list")
      .querySelector(`a[href="${CSS.escape(focused)}"]`)
      ?.focus({ preventScroll: true });
}

let searching, typing;
async function find() {
  clearTimeout(typing);
  searching?.abort();
  const text = $("find-text").value.trim();
  if (!text) {
    drawList();
    return;
  }
  searching = new AbortController();
  try {
    const { hits } = await api.search(text, searching.signal);
    list(hitList(hits));
  } catch (error) {
    if (error.name === "AbortError") return;
    list([element("p", { className: "empty" }, "Search does not answer now.")]);
  }
}

function drawer(open) {
  const within = $("side").contains(document.activeElement);
  $("app").classList.toggle("side-open", open);
  $("open-side").setAttribute("aria-expanded", String(open));
  $("main").inert = open; // The keyboard stays in the list while it covers the conversation.
  if (open) $("close-side").focus();
  else if (within && NARROW.matches) $("open-side").focus();
}
NARROW.onchange = () => drawer(false);

// --- is it being kept? ------------------------------------------------------------------------------------------------------

async function check() {
  const found = await api.health();
  const words = {
    serving: "Conversations are saved",
    not_serving: "The database is away",
    unreachable: "The history service is away",
  };
  seen(found.status === "ok", words[found.database] ?? "The history is away");
}

let looking;
function seen(saved, words = saved ? "Conversations are saved" : "The history is away") {
  clearTimeout(looking);
  const back = saved && state.away;
  state.away = !saved;
  $("state").classList.toggle("away", !saved);
  $("state").classList.toggle("well", saved);
  if ($("state-text").textContent !== words) $("state-text").textContent = words;
  $("notice").hidden = saved;
  if (!saved && !$("notice").textContent)
    $("notice").textContent = "History is not being saved at the moment. You can go on asking.";
  if (saved) $("notice").textContent = "";
  else looking = setTimeout(() => (document.hidden ? seen(false, words) : check()), WHILE_AWAY);
  if (back) loadList();
}

// --- what is done -----------------------------------------------------------------------------------------------------------

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(link.getAttribute("href"));
});
addEventListener("popstate", open);

$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (state.answering) {
    state.answering.abort();
    return;
  }
  const text = $("question").value.trim();
  if (!text) return;
  $("question").value = "";
  grow();
  ask(text);
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!state.answering) $("ask").requestSubmit();
};
function grow() {
  $("question").rows = Math.min(8, Math.max(1, $("question").value.split("\n").length));
}
$("question").oninput = grow;

$("find-text").oninput = () => {
  clearTimeout(typing);
  typing = setTimeout(find, 200);
};
$("find").onsubmit = (event) => {
  event.preventDefault();
  find();
};

$("rename").onclick = () => {
  $("rename-text").value = state.session.title;
  $("rename-box").returnValue = "";
  $("rename-box").showModal();
  $("rename-text").select();
};
$("rename-cancel").onclick = () => $("rename-box").close(); // Not a submit button: Enter means Save.
$("rename-box").onclose = async () => {
  const title = $("rename-text").value.trim();
  if ($("rename-box").returnValue !== "yes" || !title) return;
  try {
    state.session = await api.rename(state.session.session_uuid, title);
    show(state.session.title);
    loadList();
  } catch {
    check();
  }
};
$("delete").onclick = () => {
  $("delete-title").textContent = state.session.title;
  $("delete-box").returnValue = "";
  $("delete-box").showModal();
};
$("delete-box").onclose = async () => {
  if ($("delete-box").returnValue !== "yes") return;
  try {
    await api.erase(state.session.session_uuid);
    go("/");
    loadList();
  } catch {
    check();
  }
};

$("state").onclick = check;
$("open-side").onclick = () => drawer(true);
$("close-side").onclick = () => drawer(false);
$("veil").onclick = () => drawer(false);
$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    /* It holds until the page is left. */
  }
};
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (NARROW.matches) drawer(true);
    $("find-text").focus();
  } else if (event.key === "Escape") {
    if ($("find-text").value && document.activeElement === $("find-text")) {
      $("find-text").value = "";
      find();
    } else drawer(false);
  }
});

open();
loadList();
check();
