"""The RPC ExportUserData, and `UserExport`, which `chat-history export` also uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from chathistory.v1 import export_pb2

from service.rpc import convert, convert_documents
from service.rpc.call import Call
from service.rpc.conversion_turns import ConversionTurns
from service.rpc.handler import Handler
from service.search.types import unpack_vector
from service.store import export, users
from service.store.bounded_reads import (
    STREAM_PAGE_BYTES,
    UNLIMITED,
    Connection,
    Page,
    StreamBudget,
    read_held,
)
from service.store.db.database import Database
from service.store.db.readers import Reader
from service.store.db.work_class import WorkClass
from service.store.rows import DocumentRow, SessionRow, UserRow

PAGE_SIZE = 100
"""Rows that one read returns, at most."""
PARENT_PAGE_BYTES = 16 * 1024
"""Bytes of sessions, or of documents, that are kept while messages or chunks of them are sent.

They are not counted: a stream must hold nothing while it waits for room.
"""

Item = export_pb2.ExportUserDataResponse
Row = TypeVar("Row")

ListPage = Callable[[Any, Connection, int], Awaitable[Page[Row]]]
"""Reads a page; gets the cursor, a connection and the maximum bytes."""


class Exports(Handler):
    """Exports a user's data."""

    async def ExportUserData(
        self, request: export_pb2.ExportUserDataRequest, call: Call
    ) -> AsyncGenerator[Item]:
        """Send all data of one user, in order."""
        user_id = call.caller.resolve_user_id(request.user_id)
        user_export = UserExport(
            self.database,
            user_id,
            self.call_timeout_s,
            self.conversions,
            call,
            self.reader(call),
        )
        async for item in user_export.items():
            yield item


class UserExport:
    """All data of one user, read page by page."""

    def __init__(
        self,
        database: Database,
        user_id: str,
        page_timeout_s: float,
        conversions: ConversionTurns | None = None,
        budget: StreamBudget = UNLIMITED,
        reader: Reader | None = None,
    ) -> None:
        """Prepare the export.

        Args:
            database: The database.
            user_id: The user.
            page_timeout_s: Seconds for the read of each page.
            conversions: The turns in which large messages are converted.
            budget: Accounts for the bytes that the export holds.
            reader: Runs the reads that may lag; None for the database. That the user exists is
                always read from the database.
        """
        self._database = database
        self._user_id = user_id
        self._page_timeout_s = page_timeout_s
        self._conversions = conversions or ConversionTurns()
        self._budget = budget
        self._reader = reader or database

    async def items(self) -> AsyncGenerator[Item]:
        """Yield the user, each session with its messages, and each document with its chunks.

        Raises:
            NotFound: the user does not exist, or was deleted during the export.
        """
        yield Item(user=convert.user(await self._user()))
        async for item in self._sessions():
            yield item
        async for item in self._documents():
            yield item
        # If the user was deleted during the export, the export must not end like a complete one.
        await self._user()

    async def _user(self) -> UserRow:
        return await self._database.read(
            lambda connection: users.get(connection, self._user_id),
            owner_id=self._user_id,
            deadline=self._step_deadline(),
        )

    async def _sessions(self) -> AsyncGenerator[Item]:
        async for session in self._parents(
            lambda cursor, connection, max_bytes: export.list_sessions(
                connection, self._user_id, cursor, PAGE_SIZE, max_bytes
            ),
            lambda session: session.id,
        ):
            yield Item(session=convert.session(session))
            async for item in self._messages(session):
                yield item

    async def _messages(self, session: SessionRow) -> AsyncGenerator[Item]:
        """Yield the messages that the session had when it was read."""
        if not session.last_seq:
            return
        async for message in self._rows(
            lambda seq, connection, max_bytes: export.list_messages(
                connection, session.user_id, session.id, seq, PAGE_SIZE, max_bytes
            ),
            lambda message: message.seq,
            first_cursor=0,
        ):
            if message.seq > session.last_seq:
                return
            yield Item(
                message=await self._conversions.message(
                    message, session.id, self._user_id, self._step_deadline()
                )
            )

    async def _documents(self) -> AsyncGenerator[Item]:
        async for document in self._parents(
            lambda cursor, connection, max_bytes: export.list_documents(
                connection, self._user_id, cursor, PAGE_SIZE, max_bytes
            ),
            lambda document: document.id,
        ):
            yield Item(document=convert_documents.document(document))
            async for item in self._chunks(document):
                yield item

    async def _chunks(self, document: DocumentRow) -> AsyncGenerator[Item]:
        """Yield the chunks that the document had when it was read."""
        if not document.chunk_count:
            return
        async for chunk in self._rows(
            lambda index, connection, max_bytes: export.list_chunks(
                connection, document.user_id, document.id, index, PAGE_SIZE, max_bytes
            ),
            lambda chunk: chunk.chunk_index + 1,
            first_cursor=0,
        ):
            if chunk.chunk_index >= document.chunk_count:
                return
            exported = export_pb2.ExportedChunk(
                document_id=document.id, index=chunk.chunk_index, text=chunk.text
            )
            if chunk.vector is not None:
                exported.vector.extend(unpack_vector(chunk.vector))
            yield Item(chunk=exported)

    async def _parents(
        self, list_page: ListPage[Row], cursor_after: Callable[[Row], str]
    ) -> AsyncGenerator[Row]:
        """Yield rows by keyset pagination. Their bytes are released before each is yielded."""
        cursor: str | None = None
        while True:
            page = await self._read(partial(list_page, cursor), PARENT_PAGE_BYTES)
            self._budget.release(page.size_bytes)
            if not page.rows:
                return
            cursor = cursor_after(page.rows[-1])
            page.rows.reverse()
            while page.rows:
                yield page.rows.pop()

    async def _rows(
        self,
        list_page: ListPage[Row],
        cursor_after: Callable[[Row], int],
        *,
        first_cursor: int,
    ) -> AsyncGenerator[Row]:
        """Yield rows by keyset pagination. The bytes of a page are held until all are yielded."""
        cursor = first_cursor
        has_more = True
        while has_more:
            page = await self._read(partial(list_page, cursor))
            for row in page.rows:
                yield row
            # Not in a `finally`, which would run after the call's end, when nothing is held.
            self._budget.release(page.size_bytes)
            has_more = len(page.rows) == PAGE_SIZE or page.unread_bytes is not None
            if page.rows:
                cursor = cursor_after(page.rows[-1])

    async def _read(
        self,
        list_page: Callable[[Connection, int], Awaitable[Page[Row]]],
        page_bytes: int = STREAM_PAGE_BYTES,
    ) -> Page[Row]:
        async def read(max_bytes: int, deadline: float) -> Page[Row]:
            return await self._reader.read(
                lambda connection: list_page(connection, max_bytes),
                owner_id=self._user_id,
                deadline=deadline,
                work_class=WorkClass.EXPENSIVE,
            )

        return await read_held(self._budget, read, self._page_timeout_s, page_bytes)

    def _step_deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._page_timeout_s
