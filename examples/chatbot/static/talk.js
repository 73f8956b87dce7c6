// The conversation: one element a message.

import { element, icon, render } from "./markdown.js";

const SUGGESTIONS = [
  "How do I back up my conversations?",
  "What happens when the database is unavailable?",
  "Is a message ever stored twice?",
  "How does search find things?",
];

export function greeting(pick) {
  const ideas = SUGGESTIONS.map((text) =>
    element("button", { type: "button", className: "idea", onclick: () => pick(text) }, text),
  );
  return element(
    "div",
    { className: "greeting" },
    element("div", { className: "greeting-mark" }, icon("mark")),
    element("h2", {}, "What would you like to know?"),
    element(
      "p",
      {},
      "Answers come from the documents, with their sources. Everything said here is kept, and found again.",
    ),
    element("div", { className: "ideas" }, ...ideas),
  );
}

export function lost() {
  return element(
    "div",
    { className: "greeting" },
    element("h2", {}, "There is no such conversation"),
    element("p", {}, "It was deleted, or it belongs to somebody else."),
    element("a", { className: "idea", href: "/" }, "Start a new one"),
  );
}

export function question(text) {
  return element(
    "article",
    { className: "said mine", "aria-label": "You" },
    element("div", { className: "bubble" }, text),
  );
}

// An answer, which may still be growing.
export class Answer {
  constructor() {
    this.text = "";
    this.sources = [];
    this.body = element("div", { className: "prose" });
    this.foot = element("div", { className: "foot" });
    this.element = element(
      "article",
      { className: "said", "aria-label": "Answer" },
      element("div", { className: "face" }, icon("mark")),
      element("div", { className: "words" }, this.body, this.foot),
    );
  }

  static of(message) {
    const made = new Answer();
    made.text = message.content;
    made.sources = message.sources;
    made.end({ stopped: message.stopped, saved: true });
    return made;
  }

  begin(sources) {
    this.sources = sources;
    this.element.classList.add("growing");
    this.draw();
  }

  add(text) {
    this.text += text;
    // As often as the screen is drawn, and not as often as words come.
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = undefined;
      this.draw();
    });
  }

  end({ stopped, saved, failed, again }) {
    cancelAnimationFrame(this.drawing);
    this.drawing = undefined;
    this.element.classList.remove("growing");
    this.draw();
    this.foot.replaceChildren();
    if (this.sources.length) this.foot.append(this.sourceList());
    if (stopped)
      this.foot.append(
        element("p", { className: "remark" }, "This answer was stopped before its end."),
      );
    if (failed) this.foot.append(element("p", { className: "remark warn" }, failed));
    if (again)
      this.foot.append(
        element("button", { type: "button", className: "idea", onclick: again }, "Try again"),
      );
    if (!saved && !failed)
      this.foot.append(element("p", { className: "remark warn" }, "Not saved"));
  }

  draw() {
    const cite = (number) => (this.sources[number - 1] ? this.reference(number) : null);
    this.body.replaceChildren(...render(this.text, cite));
  }

  reference(number) {
    const source = this.sources[number - 1];
    const open = () => {
      const details = this.foot.querySelectorAll("details")[number - 1];
      if (!details) return;
      details.open = true;
      details.querySelector("summary").focus();
    };
    return element(
      "button",
      {
        type: "button",
        className: "cite",
        onclick: open,
        title: source.title,
        "aria-label": `Source ${number}: ${source.title}`,
      },
      String(number),
    );
  }

  sourceList() {
    const items = this.sources.map((source, index) =>
      element(
        "details",
        { className: "source" },
        element(
          "summary",
          {},
          element("span", { className: "number" }, String(index + 1)),
          element("span", { className: "source-title" }, source.title),
          source.uri
            ? element("span", { className: "source-uri" }, source.uri.replace(/^[a-z]+:\/*/i, ""))
            : "",
        ),
        element("div", { className: "passage" }, ...render(source.text)),
      ),
    );
    return element(
      "section",
      { className: "sources", "aria-label": "Sources" },
      element("h3", {}, "Sources"),
      ...items,
    );
  }
}
