// The page: its state, what it shows, and its event handlers.

import * as api from "./api.js";
import { Answer, greeting, notFound, question } from "./conversation.js";
import { element, emptyNotice } from "./dom.js";
import { hitList, sessionList } from "./sidebar.js";

const NEW_TITLE = "New conversation";
// Interval of health checks during an outage. There are none while history is available.
const OUTAGE_CHECK_MS = 3000;
const SEARCH_DELAY_MS = 200;
const HEALTH_TEXTS = {
  serving: "Conversations are saved",
  not_serving: "The database is unavailable",
  unreachable: "The history service is unavailable",
};
const NARROW = matchMedia("(max-width: 760px)");

const $ = (id) => document.getElementById(id);

const state = {
  session: null, // The conversation that is shown; null for a new one.
  sessions: null, // The list of conversations, as far as it is loaded.
  sessionsFailed: false,
  nextPageToken: "",
  answering: null, // AbortController of the answer that is streaming.
  isUnsaved: false,
  navigation: 0, // Counts navigations, to ignore replies of an earlier one.
};

// --- Navigation ---------------------------------------------------------------------------------

function showTitle(title) {
  $("title").textContent = title;
  document.title = `${title} · Chatbot`;
  $("header-buttons").hidden = !state.session;
}

function uuidFromPath() {
  return /^\/s\/([0-9a-f-]{36})$/i.exec(location.pathname)?.[1] ?? null;
}

function navigate(path) {
  if (path !== location.pathname + location.hash) history.pushState(null, "", path);
  return openFromPath();
}

async function openFromPath() {
  abortAnswer();
  toggleSidebar(false);
  state.navigation++;
  state.session = null;
  showTitle(NEW_TITLE);
  drawSessions();
  $("messages").replaceChildren();
  const uuid = uuidFromPath();
  if (uuid) await openConversation(uuid);
  else {
    $("messages").append(greeting(submit));
    $("question").focus({ preventScroll: true });
  }
}

async function openConversation(uuid) {
  const { navigation } = state;
  // Screen readers announce new messages, not the ones that are loaded.
  $("messages").setAttribute("aria-live", "off");
  try {
    const [session, page] = await Promise.all([api.getSession(uuid), api.listMessages(uuid)]);
    if (navigation !== state.navigation) return;
    state.session = session;
    showTitle(session.title);
    drawSessions();
    $("messages").append(...pageElements(page));
    scrollToTarget();
    showSaveStatus(true);
  } catch (error) {
    if (navigation !== state.navigation) return;
    if (error.status === 404 || error.status === 422) $("messages").append(notFound());
    else showError("The conversation cannot be loaded at the moment.", openFromPath);
  } finally {
    $("messages").setAttribute("aria-live", "polite");
  }
}

// The backend stores the text so far.
function abortAnswer() {
  if (!state.answering) return;
  state.answering.abort();
  state.answering = null;
  setBusy(false);
}

function pageElements(page) {
  return [...earlierButton(page.next_page_token), ...page.messages.reverse().map(messageElement)];
}

function messageElement(message) {
  const node =
    message.role === "user" ? question(message.content) : Answer.fromMessage(message).element;
  node.id = message.id;
  return node;
}

function earlierButton(pageToken) {
  if (!pageToken) return [];
  const properties = { type: "button", className: "load-more" };
  const button = element("button", properties, "Show earlier messages");
  button.onclick = async () => {
    const page = await api.listMessages(state.session.session_uuid, pageToken);
    const height = $("scroll").scrollHeight;
    button.replaceWith(...pageElements(page));
    $("scroll").scrollTop += $("scroll").scrollHeight - height;
  };
  return [button];
}

function scrollToTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target) {
    scrollToBottom();
    return;
  }
  target.scrollIntoView({ block: "center" });
  target.classList.add("highlighted");
  const removeHighlight = () => target.classList.remove("highlighted");
  target.addEventListener("animationend", removeHighlight, { once: true });
}

function scrollToBottom() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function isAtBottom() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

// --- Asking -------------------------------------------------------------------------------------

function submit(text) {
  $("question").value = text;
  $("composer").requestSubmit();
}

async function ask(text, messageId = api.newId()) {
  $("messages").querySelector(".greeting")?.remove();
  const questionElement = question(text);
  const answer = new Answer();
  $("messages").append(questionElement, answer.element);
  const retry = () => {
    questionElement.remove();
    answer.element.remove();
    ask(text, messageId); // With the same id, nothing is stored twice.
  };
  await receiveAnswer(text, messageId, answer, retry);
}

async function receiveAnswer(text, messageId, answer, retry) {
  const { navigation } = state;
  const controller = new AbortController();
  state.answering = controller;
  setBusy(true);
  answer.begin([]);
  scrollToBottom();
  try {
    await streamInto(answer, text, messageId, controller.signal);
  } catch (error) {
    if (controller.signal.aborted) answer.end({ stopped: true, saved: true });
    else {
      const isRefused = error instanceof api.ApiError;
      const message = isRefused ? `No answer: ${error.message}.` : "The connection was lost.";
      answer.end({ error: message, retry });
      checkHealth();
    }
  } finally {
    if (navigation === state.navigation) {
      state.answering = null;
      setBusy(false);
      scrollToBottom();
    }
    loadSessions();
  }
}

async function streamInto(answer, text, messageId, signal) {
  const session_uuid = state.session?.session_uuid ?? null;
  let isDone = false;
  const handlers = {
    begin: (data) => {
      answer.begin(data.sources);
      adoptSession(data);
    },
    delta: (data) => {
      const follow = isAtBottom();
      answer.add(data.text);
      if (follow) requestAnimationFrame(scrollToBottom);
    },
    done: (data) => {
      isDone = true;
      answer.text = data.answer;
      answer.end(data);
      adoptSession(data);
      showSaveStatus(data.saved);
    },
  };
  await api.streamAnswer({ message: text, message_id: messageId, session_uuid }, handlers, signal);
  if (!isDone) throw new TypeError("the stream ended before the answer was complete");
}

// Makes a conversation that the answer has started the current one.
function adoptSession({ session_uuid, title }) {
  if (!session_uuid || state.session || uuidFromPath()) return;
  state.session = { session_uuid, title: title ?? NEW_TITLE };
  history.replaceState(null, "", `/s/${session_uuid}`);
  showTitle(state.session.title);
}

function setBusy(isBusy) {
  $("messages").setAttribute("aria-busy", String(isBusy));
  $("send").setAttribute("aria-label", isBusy ? "Stop the answer" : "Send");
  $("send").classList.toggle("stop", isBusy);
  $("send")
    .querySelector("use")
    .setAttribute("href", isBusy ? "#i-stop" : "#i-send");
}

function showError(error, retry) {
  const answer = new Answer();
  const removeAndRetry = () => {
    answer.element.remove();
    retry();
  };
  answer.end({ error, retry: removeAndRetry });
  $("messages").append(answer.element);
  checkHealth();
}

// --- The list of conversations ------------------------------------------------------------------

async function loadSessions(pageToken = "") {
  try {
    const page = await api.listSessions(pageToken);
    state.sessions = pageToken ? [...state.sessions, ...page.sessions] : page.sessions;
    state.nextPageToken = page.next_page_token;
  } catch {
    state.sessionsFailed = true;
    checkHealth();
  }
  drawSessions();
}

function drawSessions() {
  if ($("search-text").value.trim()) return; // Search results are shown instead.
  const currentUuid = uuidFromPath() ?? state.session?.session_uuid;
  const loadMore = state.nextPageToken && (() => loadSessions(state.nextPageToken));
  if (state.sessions) replaceList(sessionList(state.sessions, currentUuid, loadMore));
  else if (state.sessionsFailed) {
    replaceList([emptyNotice("Your conversations cannot be loaded at the moment.")]);
  }
}

// Keeps the keyboard focus on the same entry.
function replaceList(nodes) {
  const list = $("session-list");
  const { activeElement } = document;
  const focusedPath = list.contains(activeElement) && activeElement.getAttribute("href");
  list.replaceChildren(...nodes);
  if (focusedPath) {
    list.querySelector(`a[href="${CSS.escape(focusedPath)}"]`)?.focus({ preventScroll: true });
  }
}

let searchTimer;
let searchController;
async function search() {
  clearTimeout(searchTimer);
  searchController?.abort();
  const text = $("search-text").value.trim();
  if (!text) {
    drawSessions();
    return;
  }
  searchController = new AbortController();
  try {
    const { hits } = await api.searchMessages(text, searchController.signal);
    replaceList(hitList(hits));
  } catch (error) {
    if (error.name === "AbortError") return;
    replaceList([emptyNotice("Search is unavailable at the moment.")]);
  }
}

function toggleSidebar(isOpen) {
  const hasFocus = $("sidebar").contains(document.activeElement);
  $("app").classList.toggle("sidebar-open", isOpen);
  $("open-sidebar").setAttribute("aria-expanded", String(isOpen));
  $("main").inert = isOpen; // The sidebar covers the conversation: keep the focus in it.
  if (isOpen) $("close-sidebar").focus();
  else if (hasFocus && NARROW.matches) $("open-sidebar").focus();
}
NARROW.onchange = () => toggleSidebar(false);

// --- Whether history is saved -------------------------------------------------------------------

async function checkHealth() {
  const { status, database } = await api.getHealth();
  showSaveStatus(status === "ok", HEALTH_TEXTS[database]);
}

let healthTimer;
function showSaveStatus(isSaved, text) {
  clearTimeout(healthTimer);
  const isRecovered = isSaved && state.isUnsaved;
  state.isUnsaved = !isSaved;
  $("save-status").classList.toggle("unavailable", !isSaved);
  $("save-status").classList.toggle("ok", isSaved);
  setText(
    $("save-status-text"),
    text ?? (isSaved ? HEALTH_TEXTS.serving : "History is unavailable"),
  );
  const notice = "History is not being saved at the moment. You can keep asking.";
  $("notice").hidden = isSaved;
  setText($("notice"), isSaved ? "" : notice);
  if (!isSaved) healthTimer = setTimeout(recheckHealth, OUTAGE_CHECK_MS, text);
  if (isRecovered) loadSessions();
}

function recheckHealth(text) {
  if (document.hidden) showSaveStatus(false, text);
  else checkHealth();
}

// Screen readers announce every assignment, so an unchanged text is left alone.
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// --- Events -------------------------------------------------------------------------------------

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  navigate(link.getAttribute("href"));
});
addEventListener("popstate", openFromPath);

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (state.answering) {
    state.answering.abort();
    return;
  }
  const text = $("question").value.trim();
  if (!text) return;
  $("question").value = "";
  fitQuestion();
  ask(text);
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!state.answering) $("composer").requestSubmit();
};
function fitQuestion() {
  $("question").rows = Math.min(8, Math.max(1, $("question").value.split("\n").length));
}
$("question").oninput = fitQuestion;

$("search-text").oninput = () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, SEARCH_DELAY_MS);
};
$("search").onsubmit = (event) => {
  event.preventDefault();
  search();
};

$("rename").onclick = () => {
  $("rename-text").value = state.session.title;
  $("rename-dialog").returnValue = "";
  $("rename-dialog").showModal();
  $("rename-text").select();
};
// Not a submit button, so that Enter means Save.
$("rename-cancel").onclick = () => $("rename-dialog").close();
$("rename-dialog").onclose = async () => {
  const title = $("rename-text").value.trim();
  if ($("rename-dialog").returnValue !== "yes" || !title) return;
  try {
    state.session = await api.renameSession(state.session.session_uuid, title);
    showTitle(state.session.title);
    loadSessions();
  } catch {
    checkHealth();
  }
};

$("delete").onclick = () => {
  $("delete-title").textContent = state.session.title;
  $("delete-dialog").returnValue = "";
  $("delete-dialog").showModal();
};
$("delete-dialog").onclose = async () => {
  if ($("delete-dialog").returnValue !== "yes") return;
  try {
    await api.deleteSession(state.session.session_uuid);
    navigate("/");
    loadSessions();
  } catch {
    checkHealth();
  }
};

$("save-status").onclick = checkHealth;
$("open-sidebar").onclick = () => toggleSidebar(true);
$("close-sidebar").onclick = () => toggleSidebar(false);
$("backdrop").onclick = () => toggleSidebar(false);
$("theme").onclick = () => {
  const root = document.documentElement;
  const current = root.dataset.theme ?? systemTheme();
  root.dataset.theme = current === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // Storage is disabled: the theme applies until the page is closed.
  }
};
function systemTheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (NARROW.matches) toggleSidebar(true);
    $("search-text").focus();
  } else if (event.key === "Escape") {
    if ($("search-text").value && document.activeElement === $("search-text")) {
      $("search-text").value = "";
      search();
    } else toggleSidebar(false);
  }
});

openFromPath();
loadSessions();
checkHealth();
