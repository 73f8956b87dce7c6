"""`Mark`: how far the history of a database has come.

`epoch.py` explains the marks. This module imports nothing, because the search process loads it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mark(NamedTuple):
    """A state of the history; every later state of the same history has a greater counter."""

    epoch: str
    """Id of the history. A restore begins another one."""
    counter: int


def is_restore(known: Mark, stored: Mark) -> bool:
    """Return whether a stored mark cannot follow a known one: the database has gone back in time.

    Args:
        known: A mark that the database held earlier.
        stored: The mark that it holds now.
    """
    return stored.counter < known.counter or (
        stored.counter == known.counter and stored.epoch != known.epoch
    )


def follows_declaration(known: Mark, stored: Mark) -> bool:
    """Return whether a process has declared a restore since the database held a known mark."""
    return stored.epoch != known.epoch and stored.counter > known.counter


def is_index_ahead(index_mark: Mark, stored: Mark) -> bool:
    """Return whether an index may hold changes that the database has lost.

    Args:
        index_mark: The mark of the index.
        stored: The mark of the database, read later than that of the index.
    """
    return index_mark.epoch != stored.epoch or index_mark.counter > stored.counter
