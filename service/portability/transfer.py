"""Takes a user's data out of the database, and puts it in, as lines of JSON: an operator's tool, beside the running service.

Import writes to the database itself, not through an RPC: it sets times and places that the API keeps to the server, and no caller of the
API should be able to write history.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from service.errors import ServiceError
from service.portability import jsonl
from service.rpc.export import UserExport
from service.store import documents, importing
from service.store.db.database import Database
from service.store.db.dsn import Target
from service.store.importing import ImportedMessage
from service.telemetry.logs import audit

if TYPE_CHECKING:
    from rich.progress import Progress

STEP_SECONDS = 60.0
"""For one step: a page read, or a batch written."""
BATCH = 200
"""Messages, or chunks, in one transaction."""
BATCH_BYTES = 1024 * 1024


class TransferError(Exception):
    """It cannot go on; the text says why, and where in the file."""


@dataclass
class Counts:
    """How many of each kind were handled."""

    users: int = 0
    sessions: int = 0
    messages: int = 0
    documents: int = 0
    chunks: int = 0
    written: int = field(default=0)
    """Of the messages, those that were not there yet."""

    def __str__(self) -> str:
        kinds = ("users", "sessions", "messages", "documents", "chunks")
        return (
            ", ".join(f"{getattr(self, kind)} {kind}" for kind in kinds if getattr(self, kind))
            or "nothing"
        )


@asynccontextmanager
async def _opened(target: Target) -> AsyncGenerator[Database]:
    database = Database(target, pool_size=2, max_overflow=0, hot_pool_size=1)
    try:
        problem = (await database.probe(STEP_SECONDS)).problem
        if problem:
            raise TransferError(problem)
        yield database
    finally:
        await database.close()


async def export_user(
    target: Target, user_id: str, write: Callable[[str], object], on_line: Callable[[], None]
) -> Counts:
    """Write everything of one user, a line an item.

    Raises:
        TransferError: there is no such user, or the database's schema does not fit.
        Whatever connecting raises.
    """
    counts = Counts()
    async with (
        _opened(target) as database,
        aclosing(UserExport(database, user_id, STEP_SECONDS).items()) as items,
    ):
        try:
            async for item in items:
                write(jsonl.write(item) + "\n")
                kind = f"{item.WhichOneof('item')}s"
                setattr(counts, kind, getattr(counts, kind) + 1)
                on_line()
        except ServiceError as error:
            audit(act="export", caller="operator", user_id=user_id, outcome=error.reason)
            raise TransferError(error.message) from None
    audit(act="export", caller="operator", user_id=user_id, outcome="OK")
    return counts


async def import_lines(
    target: Target,
    source: Iterable[bytes],
    *,
    user_id: str | None,
    search: bool,
    on_line: Callable[[int], None],
) -> Counts:
    """Store lines as they are, with their times and places; those that are stored already change nothing.

    Args:
        target: The database.
        source: The lines.
        user_id: Whose all of it becomes; None keeps the users of the file.
        search: Whether the search index is to learn of it.
        on_line: Is told after each line how many bytes it had.

    Raises:
        TransferError: a line cannot be read or stored. What came before it is stored; the import can be run again.
        Whatever connecting raises.
    """
    async with _opened(target) as database:
        importer = _Importer(database, jsonl.Reader(user_id), search=search)
        number = 0
        try:
            for text in source:
                number += 1
                if text.strip():
                    await importer.take(text)
                on_line(len(text))
            await importer.end()
        except jsonl.BadLine as error:
            await importer.flush()
            raise TransferError(f"line {number} {error}") from None
        except ServiceError as error:
            raise TransferError(f"at line {number}: {error.message}") from None
        finally:
            for each in sorted(importer.users):
                audit(act="import", caller="operator", user_id=each)
    return importer.counts


class _Importer:
    """Groups lines into transactions."""

    def __init__(self, database: Database, reader: jsonl.Reader, *, search: bool) -> None:
        self.counts = Counts()
        self.users: set[str] = set()
        self._database = database
        self._reader = reader
        self._search = search
        self._session: jsonl.SessionLine | None = None
        self._last: ImportedMessage | None = None
        self._messages: list[ImportedMessage] = []
        self._bytes = 0
        self._document: jsonl.DocumentLine | None = None
        self._chunks: list[jsonl.ChunkLine] = []
        self._skips_chunks = False

    async def take(self, text: bytes) -> None:
        line = self._reader.read(text)
        match line:
            case ImportedMessage():
                if self._session is None:
                    raise jsonl.BadLine("comes after a document, and not after its session")
                self.counts.messages += 1
                self._messages.append(line)
                self._last = line
                self._bytes += line.message.size
            case jsonl.ChunkLine():
                if self._document is None:
                    raise jsonl.BadLine("comes before its document")
                self.counts.chunks += 1
                self._chunks.append(line)
                self._bytes += len(line.chunk.text) + len(line.chunk.vector or b"")
            case _:
                await self.end()
                await self._begin(line)
        if self._bytes >= BATCH_BYTES or len(self._messages) + len(self._chunks) >= BATCH:
            await self.flush()

    async def _begin(self, line: jsonl.UserLine | jsonl.SessionLine | jsonl.DocumentLine) -> None:
        database = self._database
        self.users.add(self._reader.user_id)
        match line:
            case jsonl.UserLine():
                self.counts.users += 1
                await database.write(
                    lambda connection: importing.import_user(connection, line.values),
                    owner_id=line.values["id"],
                    deadline=_deadline(),
                )
            case jsonl.SessionLine():
                self.counts.sessions += 1
                self._session = line
                await database.write(
                    lambda connection: importing.import_session(connection, line.values),
                    owner_id=line.values["user_id"],
                    deadline=_deadline(),
                )
            case jsonl.DocumentLine():
                self.counts.documents += 1
                self._document = line
                row = await database.write(
                    lambda connection: documents.create(
                        connection, line.values, (), search_enabled=self._search
                    ),
                    owner_id=line.values["user_id"],
                    deadline=_deadline(),
                )
                # The same content may be there under another id.
                self._skips_chunks = row.id != line.values["id"]

    async def flush(self) -> None:
        """Store what has been gathered."""
        messages, self._messages = self._messages, []
        chunks, self._chunks = self._chunks, []
        self._bytes = 0
        if messages and self._session is not None:
            values = self._session.values
            self.counts.written += await self._database.write(
                lambda connection: importing.import_messages(
                    connection,
                    values["user_id"],
                    values["id"],
                    messages,
                    search_enabled=self._search,
                ),
                owner_id=values["user_id"],
                deadline=_deadline(),
            )
        if chunks and self._document is not None and not self._skips_chunks:
            values = self._document.values
            await self._database.write(
                lambda connection: documents.append_chunks(
                    connection,
                    [values["user_id"]],
                    values["id"],
                    chunks[0].place,
                    [each.chunk for each in chunks],
                    search_enabled=self._search,
                ),
                owner_id=values["user_id"],
                deadline=_deadline(),
            )

    async def end(self) -> None:
        """Store what has been gathered, and end the session that it belongs to."""
        await self.flush()
        if self._session is not None:
            session, last = self._session, self._last
            last_seq = max(session.last_seq, last.seq if last else 0)
            updated_us = session.updated_us or (last.created_us if last else None)
            await self._database.write(
                lambda connection: importing.finish_session(
                    connection,
                    session.values["user_id"],
                    session.values["id"],
                    last_seq,
                    updated_us,
                ),
                owner_id=session.values["user_id"],
                deadline=_deadline(),
            )
        self._session = self._last = self._document = None


def _deadline() -> float:
    return asyncio.get_running_loop().time() + STEP_SECONDS


def export_to(target: Target, user_id: str, path: Path) -> Awaitable[Counts]:
    """Export to a file, `-` for standard output, with a progress bar.

    Raises:
        As `export_user`.
    """
    owner = _uuid(user_id)

    async def work() -> Counts:
        with _writing(path) as file, _progress() as progress:
            task = progress.add_task("exporting", total=None)
            return await export_user(target, owner, file.write, lambda: progress.advance(task))

    return work()


def import_from(
    target: Target, path: Path, user_id: str | None, *, search: bool
) -> Awaitable[Counts]:
    """Import a file, `-` for standard input, with a progress bar.

    Raises:
        As `import_lines`.
    """
    owner = None if user_id is None else _uuid(user_id)

    async def work() -> Counts:
        with _reading(path) as file, _progress() as progress:
            task = progress.add_task("importing", total=os.fstat(file.fileno()).st_size or None)
            return await import_lines(
                target,
                file,
                user_id=owner,
                search=search,
                on_line=lambda count: progress.advance(task, count),
            )

    return work()


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise TransferError(f"{text!r} is no user id: those are UUIDs") from None


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    """Open a file for an export: it is there whole, or not at all, and for its owner's eyes only."""
    if str(path) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    part = path.with_name(path.name + ".part")
    try:
        part.touch(0o600)
        with part.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise TransferError(f"{part} cannot be written: {error.strerror}") from None
    part.replace(path)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise TransferError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _progress() -> Progress:
    """Make a progress bar on standard error, which shows on a terminal alone."""
    from rich.console import Console  # noqa: PLC0415 - the tests of the rest do without
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
    )
    return Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
