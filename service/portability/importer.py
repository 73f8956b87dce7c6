"""Stores JSON lines with their times and order: the command `chat-history import`.

An import writes to the database, not through an RPC. It sets times and seqs, which the API leaves
to the server: no caller of the API may write the past.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from service.errors import ServiceError
from service.portability import jsonl
from service.portability.transfer import (
    ItemCounts,
    TransferError,
    open_database,
    parse_user_id,
    progress_bar,
    step_deadline,
)
from service.store import documents, importing
from service.store.db.database import Database, Work
from service.store.db.dsn import Target
from service.store.importing import ImportedMessage
from service.telemetry.logs import audit

T = TypeVar("T")

MAX_BATCH_ITEMS = 200
"""Messages or chunks in one transaction."""
MAX_BATCH_BYTES = 1024 * 1024


async def import_from_file(
    target: Target, path: Path, user_id: str | None, *, search_enabled: bool
) -> ItemCounts:
    """Import a file, `-` for standard input, with a progress bar.

    Raises:
        TransferError: `user_id` is not a UUID, or the file cannot be read; and as `import_lines`.
    """
    owner_id = None if user_id is None else parse_user_id(user_id)
    with _open_input(path) as file, progress_bar() as progress:
        task = progress.add_task("importing", total=os.fstat(file.fileno()).st_size or None)
        return await import_lines(
            target,
            file,
            user_id=owner_id,
            search_enabled=search_enabled,
            on_line=lambda byte_count: progress.advance(task, byte_count),
        )


async def import_lines(
    target: Target,
    lines: Iterable[bytes],
    *,
    user_id: str | None,
    search_enabled: bool,
    on_line: Callable[[int], None],
) -> ItemCounts:
    """Store lines with their times and order; lines that are stored already change nothing.

    Args:
        target: The database.
        lines: The lines.
        user_id: The user who becomes the owner of all items; None keeps the users of the file.
        search_enabled: Whether the items are enqueued for the search index.
        on_line: Called after each line with its size in bytes.

    Raises:
        TransferError: a line cannot be parsed or stored; the text names the first such line. The
            import may be repeated: earlier batches stay stored, and so do all lines before one that
            cannot be parsed.
        One of `DATABASE_ERRORS`: the database cannot be reached.
    """
    async with open_database(target) as database:
        importer = _Importer(database, jsonl.LineParser(user_id), search_enabled=search_enabled)
        line_number = 0
        try:
            for line in lines:
                line_number += 1
                if line.strip():
                    await importer.add(line_number, line)
                on_line(len(line))
            await importer.finish()
        except jsonl.InvalidLine as error:
            await importer.flush()  # If it fails, its error is about an earlier line.
            raise TransferError(f"line {line_number} {error}") from None
        finally:
            for owner_id in sorted(importer.user_ids):
                audit(act="import", caller="operator", user_id=owner_id)
    return importer.counts


class _Importer:
    """Groups lines into transactions."""

    def __init__(
        self, database: Database, parser: jsonl.LineParser, *, search_enabled: bool
    ) -> None:
        self.counts = ItemCounts()
        self.user_ids: set[str] = set()
        self._database = database
        self._parser = parser
        self._search_enabled = search_enabled
        self._session: jsonl.SessionRecord | None = None
        self._session_line_number = 0
        self._last_message: ImportedMessage | None = None
        self._messages: list[ImportedMessage] = []
        self._document: jsonl.DocumentRecord | None = None
        self._chunks: list[jsonl.ChunkRecord] = []
        self._skips_chunks = False
        self._batch_lines: dict[int, int] = {}
        """Line numbers of the batch by seq, or by index if it holds chunks."""
        self._batch_bytes = 0

    async def add(self, line_number: int, line: bytes) -> None:
        """Store a line now, or together with the following ones.

        Raises:
            InvalidLine: it cannot be parsed, or does not follow its session or document.
            TransferError: it, or an earlier line, cannot be stored.
        """
        record = self._parser.parse(line)
        match record:
            case ImportedMessage():
                if self._session is None:
                    raise jsonl.InvalidLine(
                        "is a message that follows a document instead of its session"
                    )
                self.counts.messages += 1
                self._messages.append(record)
                self._last_message = record
                self._batch_lines[record.seq] = line_number
                self._batch_bytes += record.message.size
            case jsonl.ChunkRecord():
                self.counts.chunks += 1
                self._chunks.append(record)
                self._batch_lines[record.chunk_index] = line_number
                self._batch_bytes += len(record.chunk.text) + len(record.chunk.vector or b"")
            case _:
                await self.finish()
                await self._start(line_number, record)
        item_count = len(self._messages) + len(self._chunks)
        if self._batch_bytes >= MAX_BATCH_BYTES or item_count >= MAX_BATCH_ITEMS:
            await self.flush()

    async def _start(
        self,
        line_number: int,
        record: jsonl.UserRecord | jsonl.SessionRecord | jsonl.DocumentRecord,
    ) -> None:
        """Store a user, a session without its messages, or a document without its chunks."""
        owner_id = self._parser.user_id
        self.user_ids.add(owner_id)
        match record:
            case jsonl.UserRecord():
                self.counts.users += 1
                await self._write(
                    lambda connection: importing.import_user(connection, record.values),
                    owner_id,
                    line_number,
                )
            case jsonl.SessionRecord():
                self.counts.sessions += 1
                self._session = record
                self._session_line_number = line_number
                await self._write(
                    lambda connection: importing.import_session(connection, record.values),
                    owner_id,
                    line_number,
                )
            case jsonl.DocumentRecord():
                self.counts.documents += 1
                self._document = record
                row = await self._write(
                    lambda connection: documents.create(
                        connection, record.values, (), search_enabled=self._search_enabled
                    ),
                    owner_id,
                    line_number,
                )
                # `create` returns another document if the same content is stored already.
                self._skips_chunks = row.id != record.values["id"]

    async def flush(self) -> None:
        """Store the batch: messages of one session, or chunks of one document.

        Raises:
            TransferError: it cannot be stored.
        """
        messages, self._messages = self._messages, []
        chunks, self._chunks = self._chunks, []
        lines, self._batch_lines = self._batch_lines, {}
        self._batch_bytes = 0
        if messages and self._session is not None:
            await self._store_messages(self._session, messages, lines)
        if chunks and self._document is not None and not self._skips_chunks:
            await self._store_chunks(self._document, chunks, lines)

    async def _store_messages(
        self, session: jsonl.SessionRecord, messages: list[ImportedMessage], lines: dict[int, int]
    ) -> None:
        user_id, session_id = session.values["user_id"], session.values["id"]
        self.counts.new_messages += await self._write(
            lambda connection: importing.import_messages(
                connection, user_id, session_id, messages, search_enabled=self._search_enabled
            ),
            user_id,
            lines,
        )

    async def _store_chunks(
        self, document: jsonl.DocumentRecord, chunks: list[jsonl.ChunkRecord], lines: dict[int, int]
    ) -> None:
        user_id, document_id = document.values["user_id"], document.values["id"]
        await self._write(
            lambda connection: documents.append_chunks(
                connection,
                [user_id],
                document_id,
                chunks[0].chunk_index,
                [record.chunk for record in chunks],
                search_enabled=self._search_enabled,
            ),
            user_id,
            lines,
        )

    async def finish(self) -> None:
        """Store the batch, then set the `last_seq` and update time of its session.

        Raises:
            TransferError: one of them cannot be stored.
        """
        await self.flush()
        if self._session is not None:
            session, last_message = self._session, self._last_message
            last_seq = max(session.last_seq, last_message.seq if last_message else 0)
            updated_us = session.updated_us or (last_message.created_us if last_message else None)
            user_id, session_id = session.values["user_id"], session.values["id"]
            await self._write(
                lambda connection: importing.finish_session(
                    connection, user_id, session_id, last_seq, updated_us
                ),
                user_id,
                self._session_line_number,
            )
        self._session = self._last_message = self._document = None

    async def _write(self, work: Work[T], owner_id: str, lines: int | dict[int, int]) -> T:
        """Run a transaction that stores one line, or a batch of lines by seq or chunk index.

        Raises:
            TransferError: it failed. The text names the line; of a batch, the line that the error
                concerns, or the first one if it concerns them all.
        """
        try:
            return await self._database.write(work, owner_id=owner_id, deadline=step_deadline())
        except ServiceError as error:
            if isinstance(lines, int):
                line_number = lines
            else:
                first_key = next(iter(lines))
                key = int(
                    error.metadata.get("seq") or error.metadata.get("chunk_index") or first_key
                )
                line_number = lines.get(key, lines[first_key])
            raise TransferError(f"at line {line_number}: {error.message}") from None


@contextmanager
def _open_input(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise TransferError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file
