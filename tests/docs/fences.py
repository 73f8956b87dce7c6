"""Finds the fenced examples of a Markdown page, those inside content tabs and admonitions too.

An HTML comment directly before a fence gives the harness what the reader does not need to see:

    <!-- example: file=chatbot.py -->

tests/docs/scenario.py lists the directives.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark")
_DIRECTIVES = re.compile(r"<!--\s*example:\s*(.*?)\s*-->", re.DOTALL)
# Content tabs, admonitions and collapsible blocks of the site: what is indented below is Markdown.
_CONTAINER = re.compile(r'(===|!!!|\?\?\?\+?)\s[^"]*(?:"(?P<title>[^"]*)")?\s*')
_MARKER = re.compile(r"\s*(?:>\s*)?(```+|~~~+)")


@dataclass(frozen=True)
class Fence:
    """One fenced example."""

    page: str
    """The page's path, relative to the repository."""
    line: int
    """The line of the opening marker, from 1."""
    language: str
    code: str
    tab: str = ""
    """The title of the content tab that it is in; empty outside of tabs."""
    directives: dict[str, str] = field(default_factory=dict)
    """Values by name; a directive without a value has an empty one."""

    @property
    def location(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def key(self) -> tuple[str, str]:
        """The page and the first line of the code, which name the fence in `NOT_RUN`."""
        return self.page, next(
            (line.strip() for line in self.code.splitlines() if line.strip()), ""
        )


def fences_of(path: Path, root: Path) -> list[Fence]:
    """Return the fences of a page in order.

    Raises:
        AssertionError: The page has code that is indented and not fenced, or a fence that the
            parser did not find.
    """
    page, text = path.relative_to(root).as_posix(), path.read_text()
    fences = list(_parse(text, page, 0, ""))
    markers = sum(_MARKER.match(line) is not None for line in text.splitlines())
    assert markers == 2 * len(fences), f"{page}: {markers} markers, {len(fences)} fences found"
    return fences


def _parse(text: str, page: str, offset: int, tab: str) -> Iterator[Fence]:
    """Yield the fences of Markdown that begins `offset` lines down its page."""
    directives: dict[str, str] = {}
    tokens = _PARSER.parse(text)
    for position, token in enumerate(tokens):
        line = offset + (token.map[0] if token.map else 0)
        if token.type == "fence":
            language = token.info.strip().partition(" ")[0]
            yield Fence(page, line + 1, language, token.content, tab, directives)
        elif token.type == "code_block":
            container = _container(tokens[:position])
            assert container is not None, f"{page}:{line + 1}: indented code; use a fence"
            is_tab, title = container[1] == "===", container["title"] or ""
            yield from _parse(textwrap.dedent(token.content), page, line, title if is_tab else tab)
        directives = _directives(token.content) if token.type == "html_block" else {}


def _container(before: Sequence[Token]) -> re.Match[str] | None:
    """Return the head of the tab or admonition whose body follows, if that is what precedes."""
    text = next((token.content for token in reversed(before) if token.type == "inline"), "")
    return _CONTAINER.fullmatch(text.splitlines()[-1]) if text else None


def _directives(comment: str) -> dict[str, str]:
    match = _DIRECTIVES.search(comment)
    words = shlex.split(match[1]) if match else []
    return {name: value for name, _, value in (word.partition("=") for word in words)}
