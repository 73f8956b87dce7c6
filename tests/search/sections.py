"""The sections of the test texts."""

from __future__ import annotations

from pathlib import Path

TEXTS = Path(__file__).parent / "texts"


def sections(path: Path) -> list[str]:
    """Split a text into chunks at its headings."""
    return ["## " + part.strip() for part in path.read_text().split("\n## ")[1:]]
