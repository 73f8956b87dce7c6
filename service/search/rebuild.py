"""Builds a collection anew from PostgreSQL, beside the live one; store/rebuilding.py says how nothing gets lost meanwhile."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress

import structlog

from service.ids import SYSTEM_USER_ID
from service.search.types import SearchUnavailable, VectorIndex
from service.store.db.database import DATABASE_ERRORS, Database
from service.store.outbox.reindex_state import RebuildCursor, ReindexState
from service.store.tables import OutboxKind

SLICE = 256
"""Entities owed at a time."""
MOST_WAITING = 1000
"""Entities owed at once, so that what users write meanwhile need not wait for long."""
LEASE = 30.0
LOOK = 0.2
"""Seconds between two looks at how far the workers are."""

_START = (SYSTEM_USER_ID, SYSTEM_USER_ID)

_log = structlog.get_logger(__name__)


class Rebuild:
    """One process's part in rebuilding one index."""

    def __init__(
        self,
        database: Database,
        index: VectorIndex,
        alias: str,
        *,
        messages: bool,
        wake: Callable[[], None],
    ) -> None:
        self._state = ReindexState(database, alias)
        self._index = index
        self._messages = messages
        self._wake = wake
        self._lease_id = str(uuid.uuid4())

    async def run(self, *, anew: bool) -> None:
        """Build, or go on with what was begun; return when the new collection is live.

        Args:
            anew: Whether to build although a collection is there.

        Raises:
            SearchDown: the index does not answer.
        """
        while (cursor := await self._state.acquire(self._lease_id, LEASE)) is None:
            # Another process does it: this one is needed when that one is gone.
            anew = False
            await asyncio.sleep(LOOK * 5)
        try:
            await self._build(cursor, anew=anew)
        except (SearchUnavailable, asyncio.CancelledError, *DATABASE_ERRORS):
            with suppress(*DATABASE_ERRORS):
                await asyncio.shield(self._state.release(self._lease_id))
            raise

    async def _build(self, cursor: RebuildCursor, *, anew: bool) -> None:
        live = await self._index.live_collection()
        collection = cursor.collection
        if collection is None or live is None:
            if live is not None and not anew:
                await self._state.release(self._lease_id)
                return
            collection = await self._index.create_collection()
            await self._state.begin(self._lease_id, collection, messages=self._messages)
            cursor = RebuildCursor(collection, 0, *_START, 0, 0)
            _log.info("building a search index", collection=collection)
        await self._enqueue_all(cursor, collection)
        while (progress := await self._state.progress()) is not None and progress.pending:
            await self._pause(collection)
        await self._index.publish(collection)
        await self._state.end(self._lease_id)
        _log.info("the search index is built", collection=collection)

    async def _enqueue_all(self, cursor: RebuildCursor, collection: str) -> None:
        """Owe everything there is, from a cursor on."""
        for kind in (OutboxKind.DOCUMENT, OutboxKind.SESSION):
            if kind < cursor.kind or (kind == OutboxKind.SESSION and not self._messages):
                continue
            after: tuple[str, str] | None = (
                (cursor.user_id, cursor.entity_id) if kind == cursor.kind else _START
            )
            while after is not None:
                after = await self._state.enqueue_slice(self._lease_id, kind, after, SLICE, LEASE)
                self._wake()
                while (
                    progress := await self._state.progress()
                ) is not None and progress.pending > MOST_WAITING:
                    await self._pause(collection)

    async def _pause(self, collection: str) -> None:
        self._wake()
        await asyncio.sleep(LOOK)
        cursor = await self._state.acquire(self._lease_id, LEASE)
        if cursor is None or cursor.collection != collection:
            raise SearchUnavailable("another process has taken the rebuilding over")
