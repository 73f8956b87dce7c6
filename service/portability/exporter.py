"""Writes all data of one user as JSON lines: the command `chat-history export`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TextIO

from service.errors import ServiceError
from service.portability import jsonl
from service.portability.transfer import (
    STEP_TIMEOUT_S,
    ItemCounts,
    TransferError,
    open_database,
    parse_user_id,
    progress_bar,
)
from service.rpc.export import UserExport
from service.store.db.dsn import Target
from service.telemetry.logs import audit


async def export_to_file(target: Target, user_id: str, path: Path) -> ItemCounts:
    """Export a user to a file, `-` for standard output, with a progress bar.

    Raises:
        TransferError: `user_id` is not a UUID, or the file cannot be written; and as `export_user`.
    """
    user_id = parse_user_id(user_id)
    with _open_output(path) as file, progress_bar() as progress:
        task = progress.add_task("exporting", total=None)
        return await export_user(target, user_id, file.write, lambda: progress.advance(task))


async def export_user(
    target: Target, user_id: str, write: Callable[[str], object], on_line: Callable[[], None]
) -> ItemCounts:
    """Write all data of one user, one line for each item.

    Args:
        target: The database.
        user_id: The user.
        write: Called with each line.
        on_line: Called after each line.

    Raises:
        TransferError: the user does not exist, or the database's schema does not fit.
        One of `DATABASE_ERRORS`: the database cannot be reached.
    """
    counts = ItemCounts()
    async with (
        open_database(target) as database,
        aclosing(UserExport(database, user_id, STEP_TIMEOUT_S).items()) as items,
    ):
        try:
            async for item in items:
                write(jsonl.format_line(item) + "\n")
                kind = f"{item.WhichOneof('item')}s"
                setattr(counts, kind, getattr(counts, kind) + 1)
                on_line()
        except ServiceError as error:
            audit(act="export", caller="operator", user_id=user_id, outcome=error.reason)
            raise TransferError(error.message) from None
    audit(act="export", caller="operator", user_id=user_id, outcome="OK")
    return counts


@contextmanager
def _open_output(path: Path) -> Iterator[TextIO]:
    """Open an export's file: readable by its owner only, and complete or absent."""
    if str(path) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    partial_path = path.with_name(path.name + ".part")
    try:
        partial_path.touch(0o600)
        with partial_path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise TransferError(f"{partial_path} cannot be written: {error.strerror}") from None
    partial_path.replace(path)
