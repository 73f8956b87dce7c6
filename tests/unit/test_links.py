"""Links between the repository's documents lead to files and headings that exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/chathistory/chathistory/"
SITE = "https://chathistory.github.io/chathistory/"
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        ".github/**/*.md",
        "docs/**/*.md",
        "*/README.md",
        "examples/*/README.md",
    )
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
INLINE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
DEFINITION = re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
ATTRIBUTE = re.compile(r"\b(?:href|src|srcset)=\"([^\"]+)\"")


def links(page: Path) -> list[str]:
    text = CODE.sub("``", FENCE.sub("", page.read_text()))
    return [*INLINE.findall(text), *DEFINITION.findall(text), *ATTRIBUTE.findall(text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the ids of a page's headings, which GitHub and the site's toc extension agree on."""
    slugs: list[str] = []
    text = FENCE.sub("", page.read_text())
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        explicit = re.search(r"\{#([\w-]+)\}$", heading)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip()
        slugs.append(explicit[1] if explicit else re.sub(r"[\s-]+", "-", slug))
    return frozenset([*slugs, *re.findall(r"\bid=\"([\w-]+)\"", text)])


def problem(page: Path, link: str) -> str | None:
    target, _, anchor = link.partition("#")
    if target.startswith(SITE):
        path = target.removeprefix(SITE).strip("/")
        candidates = [ROOT / "docs" / f"{path or 'index'}.md", ROOT / "docs" / path / "index.md"]
        file = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    elif target.startswith(REPOSITORY):
        kind, _, path = target.removeprefix(REPOSITORY).partition("/main/")
        if kind not in ("blob", "tree", "raw"):
            return None  # Issues, releases, badges: the repository's host has them.
        file = ROOT / unquote(path)
    elif re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    else:
        file = (page.parent / unquote(target)).resolve() if target else page
        outside = (ROOT / "docs") in page.parents and (ROOT / "docs") not in file.parents
        if outside:
            return f"{link} leaves docs/: link to {REPOSITORY}blob/main/… instead"
    if not file.exists():
        return f"{link}: {file} does not exist"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{link}: {file.name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    problems = [words for link in links(page) if (words := problem(page, link)) is not None]
    assert not problems
