"""Shared by export and import: the error, the counts, the database and the progress bar."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.store.db.database import Database
from service.store.db.dsn import Target

if TYPE_CHECKING:
    from rich.progress import Progress

STEP_TIMEOUT_S = 60.0
"""Limit of one step: a page that is read, or a batch that is written."""


class TransferError(Exception):
    """An export or import failed; the text holds the reason, and the line of an import."""


@dataclass
class ItemCounts:
    """Counts of the items in an export or import."""

    users: int = 0
    sessions: int = 0
    messages: int = 0
    documents: int = 0
    chunks: int = 0
    new_messages: int = 0
    """Imported messages that were not stored before."""

    def __str__(self) -> str:
        kinds = ("users", "sessions", "messages", "documents", "chunks")
        counts = [f"{count} {kind}" for kind in kinds if (count := getattr(self, kind))]
        return ", ".join(counts) or "nothing"


@asynccontextmanager
async def open_database(target: Target) -> AsyncGenerator[Database]:
    """Open a database with two connections, one to read and one to write, and close it.

    Raises:
        TransferError: its schema does not fit.
        One of `DATABASE_ERRORS`: it cannot be reached.
    """
    database = Database(target, pool_size=2, max_overflow=0, hot_pool_size=1)
    try:
        problem = await database.prober.schema_problem(STEP_TIMEOUT_S)
        if problem:
            raise TransferError(problem)
        yield database
    finally:
        await database.close()


def step_deadline() -> float:
    """Return the deadline of a step that starts now, on the running loop's clock."""
    return asyncio.get_running_loop().time() + STEP_TIMEOUT_S


def parse_user_id(text: str) -> str:
    """Return a user's id in canonical form.

    Raises:
        TransferError: it is not a UUID.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise TransferError(f"{text!r} is not a user id, which is a UUID") from None


def progress_bar() -> Progress:
    """Return a progress bar on standard error; it is shown on a terminal only."""
    from rich.console import Console  # noqa: PLC0415 - only the command line needs rich
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
