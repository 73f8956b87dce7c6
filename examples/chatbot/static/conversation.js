// The elements of a conversation: one per message.

import { element, icon } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

const SUGGESTIONS = [
  "How do I back up my conversations?",
  "What happens when the database is unavailable?",
  "Is a message ever stored twice?",
  "How does search find things?",
];

export function greeting(onSuggestion) {
  const buttons = SUGGESTIONS.map((text) => outlineButton(text, () => onSuggestion(text)));
  const introduction =
    "Answers come from the documents and name their sources. " +
    "Your conversations are saved and can be searched.";
  return element(
    "div",
    { className: "greeting" },
    element("div", { className: "greeting-mark" }, icon("mark")),
    element("h2", {}, "What would you like to know?"),
    element("p", {}, introduction),
    element("div", { className: "suggestions" }, ...buttons),
  );
}

export function notFound() {
  return element(
    "div",
    { className: "greeting" },
    element("h2", {}, "Conversation not found"),
    element("p", {}, "It was deleted, or it belongs to another user."),
    element("a", { className: "outline-button", href: "/" }, "Start a new one"),
  );
}

export function question(text) {
  return element(
    "article",
    { className: "message from-user", "aria-label": "You" },
    element("div", { className: "bubble" }, text),
  );
}

// An answer, complete or still streaming.
export class Answer {
  constructor() {
    this.text = "";
    this.sources = [];
    this.content = element("div", { className: "prose" });
    this.footer = element("div", { className: "message-footer" });
    this.element = element(
      "article",
      { className: "message", "aria-label": "Answer" },
      element("div", { className: "avatar" }, icon("mark")),
      element("div", { className: "message-body" }, this.content, this.footer),
    );
  }

  static fromMessage(message) {
    const answer = new Answer();
    answer.text = message.content;
    answer.sources = message.sources;
    answer.end({ stopped: message.stopped, saved: true });
    return answer;
  }

  begin(sources) {
    this.sources = sources;
    this.element.classList.add("streaming");
    this.draw();
  }

  add(text) {
    this.text += text;
    // Draw once per frame, however many pieces arrive.
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }

  end({ stopped, saved, error, retry }) {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    this.element.classList.remove("streaming");
    this.draw();
    this.footer.replaceChildren();
    if (this.sources.length) this.footer.append(this.sourceList());
    if (stopped) this.footer.append(note("This answer was stopped before it was complete."));
    if (error) this.footer.append(note(error, "warn"));
    if (retry) this.footer.append(outlineButton("Try again", retry));
    if (!saved && !error) this.footer.append(note("Not saved", "warn"));
  }

  draw() {
    const cite = (number) => (this.sources[number - 1] ? this.citation(number) : null);
    this.content.replaceChildren(...renderMarkdown(this.text, cite));
  }

  citation(number) {
    const { title } = this.sources[number - 1];
    const openSource = () => {
      const details = this.footer.querySelectorAll("details")[number - 1];
      if (!details) return;
      details.open = true;
      details.querySelector("summary").focus();
    };
    const properties = {
      type: "button",
      className: "citation",
      onclick: openSource,
      title,
      "aria-label": `Source ${number}: ${title}`,
    };
    return element("button", properties, String(number));
  }

  sourceList() {
    return element(
      "section",
      { className: "sources", "aria-label": "Sources" },
      element("h3", {}, "Sources"),
      ...this.sources.map(sourceDetails),
    );
  }
}

function sourceDetails(source, index) {
  const uri = source.uri.replace(/^[a-z]+:\/*/i, "");
  return element(
    "details",
    { className: "source" },
    element(
      "summary",
      {},
      element("span", { className: "source-number" }, String(index + 1)),
      element("span", { className: "source-title" }, source.title),
      source.uri ? element("span", { className: "source-uri" }, uri) : "",
    ),
    element("div", { className: "passage" }, ...renderMarkdown(source.text)),
  );
}

function note(text, modifier = "") {
  return element("p", { className: `note ${modifier}`.trim() }, text);
}

function outlineButton(text, onclick) {
  return element("button", { type: "button", className: "outline-button", onclick }, text);
}
