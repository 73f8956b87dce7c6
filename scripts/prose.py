"""Checks names, comments, texts and Markdown against the word list scripts/prose-words.txt.

    python scripts/prose.py [PATH...]

Without a path it checks the whole repository. Markdown counts without its code; Python with its
comments, docstrings, string literals and the names it defines (under tests/, string literals are
test data and do not count); proto, C, JavaScript and TypeScript with their comments, and the latter
two with their strings and declared names; HTML and SVG with their texts. Other known files count
as a whole. Text between backticks is code and does not count. In files that neither ruff nor
mdformat checks, it also reports lines over 100 columns.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORDS = Path(__file__).with_name("prose-words.txt")
MAX_COLUMNS = 100

# Other projects' text, generated files, test data, and the tests of this checker.
_EXCLUDED = re.compile(
    r"(?:^|/)(?:\.(?!github|ci)[^/]*|__pycache__|node_modules|dist|site)/"
    r"|^(?:generated/(?:chathistory|buf)|protos/buf|docs/bench|tests/search/texts)/"
    r"|^tests/unit/test_prose\.py$"
)
# ruff and mdformat check the length of these lines, and pictures are not read as text.
_FORMATTED = (".py", ".md", ".svg")
_IDENTIFIER_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SPOKEN_ATTRIBUTES = {"alt", "aria-label", "content", "placeholder", "title"}


@dataclass(frozen=True)
class Rule:
    """One line of the word list."""

    pattern: re.Pattern[str]
    suggestion: str


@dataclass(frozen=True)
class Rules:
    """The word list: rules for prose, and rules for whole identifiers."""

    words: tuple[Rule, ...]
    names: tuple[Rule, ...]


class Passage(NamedTuple):
    """A text or an identifier, and the line of its file on which it begins."""

    line: int
    text: str
    is_name: bool = False


class Finding(NamedTuple):
    """A rejected word or a long line: where it is, and what to write instead."""

    path: str
    line: int
    word: str
    suggestion: str


def read_rules(text: str) -> Rules:
    """Parse a word list; raise ValueError that names the line if one has neither form."""
    sections: dict[str, list[Rule]] = {"words": [], "names": []}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            continue
        pattern, arrow, suggestion = line.partition(" => ")
        if not arrow or section not in sections:
            msg = f"prose-words.txt:{number}: expected `expression => suggestion` in a section"
            raise ValueError(msg)
        flags = re.NOFLAG if re.search(r"[A-Z]", pattern) else re.IGNORECASE
        if section == "words":
            # An expression that ends in punctuation may be followed by anything.
            end = r"(?!\w)" if re.search(r"[\w)?]$", pattern) else ""
            spaced = pattern.replace(" ", r"\s+")
            pattern = rf"(?<![\w-]){spaced}{end}"
        sections[section].append(Rule(re.compile(pattern, flags), suggestion))
    return Rules(tuple(sections["words"]), tuple(sections["names"]))


def check(path: str, source: str, rules: Rules) -> Iterator[Finding]:
    """Yield the findings in one file; `path` is relative to the repository, with slashes."""
    if not path.endswith(_FORMATTED):
        for number, content in enumerate(source.splitlines(), 1):
            if len(content) > MAX_COLUMNS:
                yield Finding(path, number, f"{content[:20]}…", f"wrap at {MAX_COLUMNS} columns")
    for passage in [Passage(1, path), *_passages(path, source)]:
        text = passage.text
        if passage.is_name:
            for rule in rules.names:
                if rule.pattern.fullmatch(text.lstrip("_")):
                    yield Finding(path, passage.line, text, rule.suggestion)
            text = " ".join(_IDENTIFIER_PART.findall(text))
        else:
            text = _without_code_spans(text)
        for rule in rules.words:
            for match in rule.pattern.finditer(text):
                line = passage.line + text.count("\n", 0, match.start())
                word = " ".join(match[0].split())
                yield Finding(path, line, word, rule.suggestion)


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files under `paths` that can be checked, in order."""
    for path in paths:
        if path.is_file():
            if _is_checked(path):
                yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(
                name
                for name in folders
                if not _EXCLUDED.search(_relative(Path(folder, name)) + "/")
            )
            yield from (file for name in sorted(names) if _is_checked(file := Path(folder, name)))


def _relative(path: Path) -> str:
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def _is_checked(path: Path) -> bool:
    return _reader(path.name) is not None and not _EXCLUDED.search(_relative(path))


def _passages(path: str, source: str) -> Iterable[Passage]:
    name = path.rpartition("/")[2]
    if name.endswith(".py"):
        return _python(source, strings=not path.startswith("tests/"))
    reader = _reader(name)
    return reader(source) if reader else ()


def _reader(name: str) -> Callable[[str], Iterable[Passage]] | None:
    return _READERS.get(name) or _READERS.get(Path(name).suffix)


def _without_code_spans(text: str) -> str:
    """Blank what is between backticks, keeping the line breaks."""
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", _blank, text, flags=re.DOTALL)


def _blank(match: re.Match[str]) -> str:
    # No white space: the words before and after a code span are no phrase.
    return re.sub(r"[^\n]", "\0", match[0])


def _whole(source: str) -> Iterator[Passage]:
    yield Passage(1, source)


def _markdown(source: str) -> Iterator[Passage]:
    fence = ""
    lines = []
    for line in source.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if fence:
            if mark and mark[1].startswith(fence):
                fence = ""
            lines.append("")
        elif mark:
            fence = mark[1]
            lines.append("")
        else:
            lines.append(line)
    yield Passage(1, "\n".join(lines))


def _python(source: str, *, strings: bool = True) -> Iterator[Passage]:
    if "#" in source:
        yield from _python_comments(source)
    tree = ast.parse(source)
    inside_f_strings: set[int] = set()
    for node in ast.walk(tree):
        yield from (Passage(line, name, is_name=True) for line, name in _defined_names(node))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if not strings and isinstance(first, ast.Expr):
                yield from _string(first.value)
        elif strings and isinstance(node, ast.JoinedStr):
            inside_f_strings.update(map(id, node.values))
            texts = (_text(value) or "\0" for value in node.values)
            yield Passage(node.lineno, "".join(texts))
        elif strings and id(node) not in inside_f_strings:
            yield from _string(node)


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _string(node: ast.AST) -> Iterator[Passage]:
    if text := _text(node):
        yield Passage(getattr(node, "lineno", 1), text)


def _python_comments(source: str) -> Iterator[Passage]:
    """Yield comments, those of consecutive lines as one passage."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if block and line != last + 1:
            yield Passage(first, "\n".join(block))
            block = []
        if not block:
            first = line
        block.append(token.string.lstrip("#"))
        last = line
    if block:
        yield Passage(first, "\n".join(block))


def _defined_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the identifiers that a node introduces, with their lines."""
    match node:
        case (
            ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.ClassDef(name=name)
            | ast.Name(id=name, ctx=ast.Store())
            | ast.Attribute(attr=name, ctx=ast.Store())
            | ast.arg(arg=name)
            | ast.alias(asname=str(name))
            | ast.ExceptHandler(name=str(name))
            | ast.MatchAs(name=str(name))
            | ast.MatchStar(name=str(name))
        ):
            yield node.lineno, name
        case ast.Call(keywords=keywords):
            yield from ((keyword.value.lineno, keyword.arg) for keyword in keywords if keyword.arg)


_C_LIKE = re.compile(
    r"""(?P<comment>(?://[^\n]*(?:\n[ \t]*(?=//))?)+|/\*.*?\*/)"""
    r"""|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`)"""
    r"""|\b(?:const|let|var|function|class)\s+(?P<name>[A-Za-z_$][\w$]*)""",
    re.DOTALL,
)


def _c_like(source: str, *, first_line: int = 1, is_script: bool = False) -> Iterator[Passage]:
    for match in _C_LIKE.finditer(source):
        line = first_line + source.count("\n", 0, match.start())
        if match["comment"]:
            yield Passage(line, re.sub(r"(?m)^[ \t]*(?://+|\*+)", "", match[0]))
        elif is_script and match["string"]:
            yield Passage(line, re.sub(r"\$\{[^}]*\}", "\0", match[0][1:-1]))
        elif is_script and match["name"]:
            yield Passage(line, match["name"], is_name=True)


def _script(source: str) -> Iterator[Passage]:
    return _c_like(source, is_script=True)


class _Html(HTMLParser):
    """Collects the texts, comments and spoken attributes of a page, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.passages: list[Passage] = []
        self._raw_tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._raw_tag = tag if tag in {"script", "style"} else ""
        line = self.getpos()[0]
        self.passages += [
            Passage(line, value) for name, value in attrs if name in _SPOKEN_ATTRIBUTES and value
        ]

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._raw_tag = ""

    def handle_data(self, data: str) -> None:
        line = self.getpos()[0]
        if self._raw_tag:
            is_script = self._raw_tag == "script"
            self.passages += _c_like(data, first_line=line, is_script=is_script)
        else:
            self.passages.append(Passage(line, data))

    def handle_comment(self, data: str) -> None:
        self.passages.append(Passage(self.getpos()[0], data))


def _html(source: str) -> Iterable[Passage]:
    parser = _Html()
    parser.feed(source)
    parser.close()
    return parser.passages


_READERS: dict[str, Callable[[str], Iterable[Passage]]] = {
    **dict.fromkeys((".py",), _python),
    **dict.fromkeys((".md",), _markdown),
    **dict.fromkeys((".html", ".svg"), _html),
    **dict.fromkeys((".js", ".mjs", ".ts", ".tsx"), _script),
    **dict.fromkeys((".proto", ".css", ".c"), _c_like),
    **dict.fromkeys((".toml", ".yml", ".yaml", ".ini", ".sh", ".mako"), _whole),
    **dict.fromkeys(("Makefile", "Dockerfile", "run", ".gitignore"), _whole),
}


def main(arguments: list[str]) -> int:
    """Print the findings, and return the exit status: 1 if there are any."""
    rules = read_rules(WORDS.read_text())
    count = 0
    for path in files([Path(argument) for argument in arguments] or [ROOT]):
        for finding in sorted(check(_relative(path), path.read_text(), rules)):
            print(f"{finding.path}:{finding.line}: {finding.word!r}: {finding.suggestion}")
            count += 1
    if count:
        print(f"{count} findings; the word list is scripts/prose-words.txt", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
