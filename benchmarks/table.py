"""A table of figures, for the terminal and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A table, whose first column labels the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    plot: str = ""
    """Name of the plot of its figures."""

    def rich(self) -> RichTable:
        """Return the table for the terminal."""
        table = RichTable(
            title=self.title,
            title_justify="left",
            caption=self.note or None,
            caption_justify="left",
        )
        for n, column in enumerate(self.columns):
            table.add_column(column, justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*(re.sub(r"\*\*(.*)\*\*", r"[bold]\1[/]", cell) for cell in row))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [
            _line(self.columns),
            _line(["--", *["-:"] * (len(self.columns) - 1)]),
            *map(_line, self.rows),
        ]
        parts = [f"### {self.title}", "\n".join(lines)]
        if self.note:
            parts.append(wrap(self.note))
        if self.plot:
            parts.append(f"![{self.title}](../bench/{self.plot}.svg)")
        return "\n\n".join(parts)


def wrap(text: str) -> str:
    """Wrap a paragraph as the repository's Markdown formatter does."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
