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
from service.store.db.database import Database, Work
from service.store.rows import DocumentRow, SessionRow, UserRow

PAGE_SIZE = 100
CHUNK_PAGE_SIZE = 10
"""Smaller, since a chunk may have 256 KiB of text and a vector of the same size."""

Item = export_pb2.ExportUserDataResponse
T = TypeVar("T")
Row = TypeVar("Row")


class Exports(Handler):
    """Exports a user's data."""

    async def ExportUserData(
        self, request: export_pb2.ExportUserDataRequest, call: Call
    ) -> AsyncGenerator[Item]:
        """Send all data of one user, in order."""
        user_id = call.caller.resolve_user_id(request.user_id)
        user_export = UserExport(self.database, user_id, self.call_timeout_s, self.conversions)
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
    ) -> None:
        """Prepare the export; each page must be read within `page_timeout_s`."""
        self._database = database
        self._user_id = user_id
        self._page_timeout_s = page_timeout_s
        self._conversions = conversions or ConversionTurns()

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
        return await self._read(lambda connection: users.get(connection, self._user_id))

    async def _sessions(self) -> AsyncGenerator[Item]:
        async for session in self._rows(
            lambda cursor, connection: export.list_sessions(
                connection, self._user_id, cursor, PAGE_SIZE
            ),
            first_cursor=None,
            cursor_after=lambda session: session.id,
        ):
            yield Item(session=convert.session(session))
            async for item in self._messages(session):
                yield item

    async def _messages(self, session: SessionRow) -> AsyncGenerator[Item]:
        """Yield the messages that the session had when it was read."""
        async for message in self._rows(
            lambda seq, connection: export.list_messages(
                connection, session.user_id, session.id, seq, PAGE_SIZE
            ),
            first_cursor=0,
            cursor_after=lambda message: message.seq,
        ):
            if message.seq > session.last_seq:
                return
            yield Item(
                message=await self._conversions.message(
                    message, session.id, self._user_id, self._step_deadline()
                )
            )

    async def _documents(self) -> AsyncGenerator[Item]:
        async for document in self._rows(
            lambda cursor, connection: export.list_documents(
                connection, self._user_id, cursor, PAGE_SIZE
            ),
            first_cursor=None,
            cursor_after=lambda document: document.id,
        ):
            yield Item(document=convert_documents.document(document))
            async for item in self._chunks(document):
                yield item

    async def _chunks(self, document: DocumentRow) -> AsyncGenerator[Item]:
        """Yield the chunks that the document had when it was read."""
        async for chunk in self._rows(
            lambda index, connection: export.list_chunks(
                connection, document.user_id, document.id, index, CHUNK_PAGE_SIZE
            ),
            first_cursor=0,
            cursor_after=lambda chunk: chunk.chunk_index + 1,
        ):
            if chunk.chunk_index >= document.chunk_count:
                return
            exported = export_pb2.ExportedChunk(
                document_id=document.id, index=chunk.chunk_index, text=chunk.text
            )
            if chunk.vector is not None:
                exported.vector.extend(unpack_vector(chunk.vector))
            yield Item(chunk=exported)

    async def _rows(
        self,
        list_page: Callable[[Any, Any], Awaitable[list[Row]]],
        *,
        first_cursor: str | int | None,
        cursor_after: Callable[[Row], str | int],
    ) -> AsyncGenerator[Row]:
        """Yield rows by keyset pagination; `list_page` gets the cursor and a connection."""
        cursor = first_cursor
        while page := await self._read(partial(list_page, cursor)):
            for row in page:
                yield row
            cursor = cursor_after(page[-1])

    async def _read(self, work: Work[T]) -> T:
        return await self._database.read(
            work, owner_id=self._user_id, deadline=self._step_deadline()
        )

    def _step_deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._page_timeout_s
