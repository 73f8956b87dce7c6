"""Rebuilds an index: fills a new collection from PostgreSQL while the live one stays in use.

`store/outbox/reindex_state.py` describes why no change during a rebuild is lost.

An index is also rebuilt when it may hold what PostgreSQL has lost by a restore or a failover: its
mark shows that (`store/epoch.py`). A new collection gets a mark when it is created, so that a build
is not continued beyond a restore.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress

import structlog

from service.ids import SYSTEM_USER_ID
from service.search.types import SearchUnavailable, VectorIndex
from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.retries import backoff
from service.store.epoch import EpochKeeper
from service.store.history_mark import Mark, is_index_ahead
from service.store.outbox.reindex_state import RebuildCursor, ReindexState
from service.store.tables import OutboxKind

SLICE_ENTITIES = 256
"""Documents or sessions that are enqueued at a time."""
MAX_PENDING = 1000
"""Maximum pending entities of a rebuild, so that changes by users do not wait long behind them."""
LEASE_S = 30.0
"""Lease of the process that rebuilds; it is renewed at every slice and every poll."""
POLL_S = 0.2
"""Time between two reads of the progress."""
TAKEOVER_POLL_S = 1.0
"""Time between two attempts to take over a rebuild that another process runs."""

_START = (SYSTEM_USER_ID, SYSTEM_USER_ID)
"""A (user id, entity id) before all others: the system's id is the nil UUID."""

_log = structlog.get_logger(__name__)


async def is_ahead(index: VectorIndex, epoch: EpochKeeper, collection: str | None = None) -> bool:
    """Return whether a collection, by default the live one, may hold what the database has lost.

    Raises:
        SearchUnavailable: the index does not respond.
        Any of `DATABASE_ERRORS`.
    """
    index_mark = await index.read_mark(collection)
    # In this order: the mark of the database rises, and is stored in the index afterwards.
    return index_mark is not None and is_index_ahead(index_mark, await epoch.read())


class Rebuild:
    """Rebuilds of one index by this process."""

    def __init__(
        self,
        database: Database,
        epoch: EpochKeeper,
        index: VectorIndex,
        alias: str,
        *,
        indexes_messages: bool,
        wake: Callable[[], None],
    ) -> None:
        """Prepare rebuilds.

        Args:
            database: The database.
            epoch: The epoch of the database's history.
            index: The index.
            alias: The alias of the index.
            indexes_messages: Whether messages are indexed, in addition to documents.
            wake: Wakes the indexer, which fills the collection.
        """
        self._state = ReindexState(database, alias)
        self._epoch = epoch
        self._index = index
        self._indexes_messages = indexes_messages
        self._wake = wake
        self._lease_id = str(uuid.uuid4())

    async def run_until_built(self, *, force: bool) -> None:
        """Run as `run`, and retry with a back-off until the index is built."""
        attempt = 0
        while True:
            try:
                await self.run(force=force)
                return
            except Exception as error:  # noqa: BLE001 - search needs an index
                attempt += 1
                is_expected = isinstance(error, (SearchUnavailable, *DATABASE_ERRORS))
                _log.warning(
                    "search index rebuild failed and is retried",
                    problem=type(error).__name__,
                    exc_info=not is_expected,
                )
                await asyncio.sleep(0.5 + backoff(attempt, base_s=0.5, cap_s=30.0))

    async def run(self, *, force: bool) -> None:
        """Build a collection, or continue an unfinished build. Return when the collection is live.

        While another process builds one, wait. If that process dies, continue its build.

        Args:
            force: Whether to build although a live collection exists. One that may hold what the
                database has lost is replaced in any case.

        Raises:
            SearchUnavailable: the index does not respond, or the database was restored.
        """
        while (cursor := await self._state.acquire(self._lease_id, LEASE_S)) is None:
            force = False
            await asyncio.sleep(TAKEOVER_POLL_S)
        try:
            await self._build(cursor, force=force)
        except (SearchUnavailable, asyncio.CancelledError, *DATABASE_ERRORS):
            with suppress(*DATABASE_ERRORS):
                await asyncio.shield(self._state.release(self._lease_id))
            raise

    async def _build(self, cursor: RebuildCursor, *, force: bool) -> None:
        mark = await self._epoch.read()
        live = await self._index.live_collection()
        collection = cursor.collection
        if collection is not None and not await self._can_continue(collection):
            collection = None
        if collection is None or live is None:
            if live is not None and await is_ahead(self._index, self._epoch):
                _log.warning("the search index is ahead of the database and is rebuilt")
            elif live is not None and not force:
                await self._state.release(self._lease_id)
                return
            collection = await self._index.create_collection(mark)
            await self._state.begin(
                self._lease_id, collection, indexes_messages=self._indexes_messages
            )
            cursor = RebuildCursor(collection, 0, *_START, 0, 0)
            _log.info("building a search index", collection=collection)
        await self._enqueue_all(cursor, collection, mark)
        await self._wait_for_indexers(collection, mark, max_pending=0)
        await self._index.publish(collection)
        await self._state.end(self._lease_id)
        self._require_epoch(mark)
        _log.info("the search index is built", collection=collection)

    async def _can_continue(self, collection: str) -> bool:
        """Return whether a collection exists, and was not begun before a restore."""
        return await self._index.has_collection(collection) and not await is_ahead(
            self._index, self._epoch, collection
        )

    def _require_epoch(self, mark: Mark) -> None:
        """Check that the database has not been restored since a mark was read.

        Raises:
            SearchUnavailable: it has. Enqueued entities are lost, and the build must begin again.
        """
        if self._epoch.mark is not None and self._epoch.mark.epoch != mark.epoch:
            raise SearchUnavailable("the database was restored during the rebuild")

    async def _enqueue_all(self, cursor: RebuildCursor, collection: str, mark: Mark) -> None:
        """Enqueue all documents and sessions after a cursor, in slices."""
        for kind in (OutboxKind.DOCUMENT, OutboxKind.SESSION):
            if kind < cursor.kind or (kind == OutboxKind.SESSION and not self._indexes_messages):
                continue
            after: tuple[str, str] | None = (
                (cursor.user_id, cursor.entity_id) if kind == cursor.kind else _START
            )
            while after is not None:
                after = await self._state.enqueue_slice(
                    self._lease_id, kind, after, SLICE_ENTITIES, LEASE_S
                )
                self._wake()
                await self._wait_for_indexers(collection, mark, max_pending=MAX_PENDING)

    async def _wait_for_indexers(self, collection: str, mark: Mark, *, max_pending: int) -> None:
        """Wait until at most `max_pending` entities of the rebuild are pending.

        Raises:
            SearchUnavailable: another process has taken the rebuild over, or the database was
                restored.
        """
        while True:
            progress = await self._state.progress()
            self._require_epoch(mark)
            if progress is None or progress.pending <= max_pending:
                return
            self._wake()
            await asyncio.sleep(POLL_S)
            cursor = await self._state.acquire(self._lease_id, LEASE_S)
            if cursor is None or cursor.collection != collection:
                raise SearchUnavailable("another process has taken the rebuild over")
