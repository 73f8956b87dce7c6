"""The indexer: processes the search outbox and keeps the index equal to PostgreSQL.

It claims rows of the outbox, reads the current items from PostgreSQL, embeds them, writes them to
the index, and deletes the rows. No transaction is open during a call of the index or of the
embeddings. A lease ensures that one replica at a time processes a row, and no write starts so late
that it could arrive after the lease has expired.

Before each write the indexer raises the counter of the history, and it stores the mark together
with the changes. If PostgreSQL loses what the index holds, it loses that counter, too, and the
index is rebuilt (`store/epoch.py`).

The indexer runs at its start and after commits of its own process. It sets a timer only while rows
are pending: an idle service sends no statement, so that a serverless database can suspend.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from service.search import pacing
from service.search.embeddings import Embeddings
from service.search.index_changes import ChangeBuilder, Rejection
from service.search.index_writer import IndexWriter, WriteFailed
from service.search.types import (
    Changes,
    IndexFull,
    IndexingStats,
    InputRejected,
    Point,
    PointFilter,
    PointKind,
    SearchOverloaded,
    SearchUnavailable,
    VectorIndex,
)
from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.retries import backoff
from service.store.epoch import EpochKeeper
from service.store.history_mark import Mark, is_index_ahead
from service.store.outbox.index_source import EntityKey, IndexSource, Range, split_ranges
from service.store.outbox.outbox import MAX_ATTEMPTS, Backlog, LeasedRow, Outbox
from service.store.outbox.reindex_state import ReindexState
from service.store.tables import DocumentStatus, OutboxKind

CLAIM_LIMIT = 256
"""Rows claimed at a time."""
PAGE_ITEMS = 128
"""Items that are read, embedded and written at a time: a search waits for at most one such page."""
LEASE_S = 60.0
"""Lease of a batch; renewed when less than LEASE_MARGIN_S remains at a write."""
LEASE_MARGIN_S = 30.0
"""Time that must remain of the lease when a write starts: longer than a write can take."""
RETRY_BASE_S, RETRY_CAP_S = 1.0, 60.0
"""First and longest pause before a rejected row is processed again."""
RECHECK_S = 5.0
"""Minimum time between two counts of the backlog while other processes hold rows of it."""
BATCH_WINDOW_S = 0.02
"""Batching window: time after a commit in which further commits join the same batch."""
BUSY_BATCH_WINDOW_S = 0.25
"""Batching window between batches under constant commits, so that a session that keeps growing
is processed a few times a second only."""
BUSY_MAX_LAG_S = 2.0
"""Lag above which batches follow each other without BUSY_BATCH_WINDOW_S."""
AHEAD_PAUSE_S = 0.2
"""Pause while a rebuild begins because the index holds what the database does not."""
FINISH_ATTEMPTS = 6
"""Attempts to delete finished rows, with pauses that double from 5 ms."""

_POINT_KINDS = {OutboxKind.DOCUMENT: PointKind.CHUNK, OutboxKind.SESSION: PointKind.MESSAGE}

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Batch:
    """Rows that were claimed together under one lease."""

    lease_id: str
    lease_until: float
    """End of the lease, on the event loop's clock."""
    rows: list[LeasedRow]
    building: str | None = None
    """The collection that a rebuild is filling."""
    index_mark: Mark | None = None
    """The mark of the collection that is filled, or of the live one, before the first write."""
    rejected: dict[LeasedRow, Rejection] = field(default_factory=dict)
    """Rows of which an item was rejected."""


class LeaseLost(Exception):
    """The lease has expired, and another process may have claimed the same rows."""


class IndexAhead(Exception):
    """The index may hold what the database has lost, and must be rebuilt before it is written."""


_INTERRUPTIONS = (SearchUnavailable, IndexAhead, asyncio.CancelledError, *DATABASE_ERRORS)
"""Errors that end a batch whose rows must be processed again."""


class Indexer:
    """Processes the outbox in the background; one for each server process."""

    def __init__(
        self,
        database: Database,
        epoch: EpochKeeper,
        index: VectorIndex,
        embeddings: Embeddings,
        alias: str,
        *,
        dimensions: int,
        indexes_messages: bool,
        on_down: Callable[[str], None],
        on_ahead: Callable[[], None],
    ) -> None:
        """Create a stopped indexer.

        Args:
            database: The database.
            epoch: The epoch of the database's history.
            index: The index.
            embeddings: The embeddings.
            alias: The alias of the index.
            dimensions: Dimensions of the index's vectors.
            indexes_messages: Whether messages are indexed, in addition to documents.
            on_down: Called with the reason when the indexer stops because search is unavailable.
            on_ahead: Called when the index may hold what the database has lost.
        """
        self.stats = IndexingStats()
        self._database = database
        self._outbox = Outbox(database)
        self._source = IndexSource(database)
        self._epoch = epoch
        self._reindex_state = ReindexState(database, alias)
        self._index = index
        self._writer = IndexWriter(index, self.stats)
        self._changes = ChangeBuilder(embeddings, dimensions)
        self._indexes_messages = indexes_messages
        self._on_down = on_down
        self._on_ahead = on_ahead
        self._loop = asyncio.get_running_loop()
        self._wakeup = asyncio.Event()
        self._cores = pacing.usable_cores()
        self._task: asyncio.Task[None] | None = None
        self._last_batch_finished = True

    def start(self) -> None:
        """Start with the pending rows, unless the indexer runs already."""
        self._wakeup.set()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._run())

    async def stop(self) -> None:
        """Stop, and release the rows of the current batch for the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def wake(self) -> None:
        """Read the outbox soon: this process has committed a change."""
        self._wakeup.set()
        if self.stats.oldest_pending_at is None:
            self.stats.oldest_pending_at = time.monotonic()
            self.stats.pending += 1

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                wait_s = await self._process_due()
                failures = 0
            except asyncio.CancelledError:
                raise
            except SearchOverloaded:
                failures += 1
                wait_s = backoff(failures, base_s=0.5, cap_s=30.0) + 0.5
            except WriteFailed as error:
                if not await self._writer.is_searchable():
                    self._on_down(str(error))
                    return
                await self._writer.pause(str(error))
                wait_s = 0.0
            except SearchUnavailable as error:
                # `Search` polls the index until it responds, and then starts this indexer again.
                self._on_down(str(error))
                return
            except IndexAhead:
                self._on_ahead()
                wait_s = AHEAD_PAUSE_S
            except Exception as error:  # noqa: BLE001 - no row may end the indexer
                if not isinstance(error, (*DATABASE_ERRORS, LeaseLost)):
                    _log.error("indexing failed", error=type(error).__name__, exc_info=True)
                failures += 1
                wait_s = backoff(failures, base_s=0.5, cap_s=30.0) + 0.1
            await self._sleep(wait_s)

    async def _sleep(self, max_s: float | None) -> None:
        """Wait for a commit, for at most `max_s` seconds; None for no limit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max_s):
                await self._wakeup.wait()
        await asyncio.sleep(BATCH_WINDOW_S)

    async def _process_due(self) -> float | None:
        """Process rows until none is due.

        Returns:
            Seconds until the next row is due; None when no row is pending.
        """
        self._wakeup.clear()
        counted_at = self._loop.time()
        while await self._process_batch():
            if self.stats.lag_s < BUSY_MAX_LAG_S:
                await asyncio.sleep(BUSY_BATCH_WINDOW_S)
            if self._loop.time() - counted_at > RECHECK_S:
                await self._count_backlog()
                counted_at = self._loop.time()
        due_s = (await self._count_backlog()).next_due_s
        if due_s is None:
            return None
        return max(due_s, 0.05) if due_s < RECHECK_S else max(RECHECK_S, due_s / 2)

    async def _count_backlog(self) -> Backlog:
        backlog = await self._outbox.backlog()
        if backlog.dated_ahead and (count := await self._outbox.date_again()):
            _log.warning("outbox rows dated ahead are due now", rows=count)
            backlog = await self._outbox.backlog()
        stats = self.stats
        stats.pending, stats.failed = backlog.pending, backlog.failed
        stats.oldest_pending_at = (
            time.monotonic() - backlog.oldest_age_s if backlog.pending else None
        )
        return backlog

    async def _process_batch(self) -> bool:
        """Claim and process a batch of due rows; return False if none was due."""
        batch = _Batch(str(uuid.uuid4()), self._loop.time() + LEASE_S, [])
        batch.rows = await self._outbox.claim(batch.lease_id, LEASE_S, CLAIM_LIMIT)
        if not batch.rows:
            return False
        oldest_claimed_at = time.monotonic() - max(row.age_s for row in batch.rows)
        # After a failed batch older rows are still pending, and may not be among the claimed ones.
        oldest_known_at = self.stats.oldest_pending_at
        if oldest_known_at is not None and not self._last_batch_finished:
            oldest_claimed_at = min(oldest_known_at, oldest_claimed_at)
        self.stats.oldest_pending_at = oldest_claimed_at
        self._last_batch_finished = False
        try:
            # Read after the claim: a rebuild that begins later enqueues every row again.
            batch.building = await self._reindex_state.building_collection()
            batch.index_mark = await self._index.read_mark(batch.building)
            self._require_same_history(batch, await self._epoch.read())
            await self._index_rows(batch, batch.rows)
        except _INTERRUPTIONS:
            await asyncio.shield(self._release_batch(batch))
            raise
        except InputRejected as error:
            await self._isolate_rejected(batch, Rejection.of(error))
        await self._finish_batch(batch)
        self._last_batch_finished = True
        return True

    async def _release_batch(self, batch: _Batch) -> None:
        """Release the rows for an immediate claim."""
        rows = batch.rows
        with suppress(*DATABASE_ERRORS):
            for attempt in range(FINISH_ATTEMPTS):
                released_keys = await self._outbox.release(batch.lease_id, rows, 0.0)
                rows = [row for row in rows if row[:3] not in released_keys]
                if not rows:
                    return
                # An append or a rebuild has locked the remaining rows, which would otherwise wait
                # for the end of the lease.
                await asyncio.sleep(0.005 * 2**attempt)

    async def _isolate_rejected(self, batch: _Batch, rejection: Rejection) -> None:
        """Process each row alone, so that a rejected one does not block the others."""
        if len(batch.rows) == 1:
            batch.rejected[batch.rows[0]] = rejection
            return
        for row in batch.rows:
            try:
                await self._index_rows(batch, [row])
            except InputRejected as error:
                batch.rejected[row] = Rejection.of(error)
            except _INTERRUPTIONS:
                await asyncio.shield(self._release_batch(batch))
                raise

    async def _index_rows(self, batch: _Batch, rows: list[LeasedRow]) -> None:
        """Make the index match PostgreSQL for these rows of a batch."""
        deleted_users = [PointFilter(row.user_id) for row in rows if row.kind == OutboxKind.USER]
        if deleted_users:
            await self._write(batch, Changes(delete_filters=deleted_users))
        for kind in (OutboxKind.DOCUMENT, OutboxKind.SESSION):
            rows_of_kind = [row for row in rows if row.kind == kind]
            if rows_of_kind:
                await self._index_entities(batch, kind, rows_of_kind)

    async def _index_entities(self, batch: _Batch, kind: OutboxKind, rows: list[LeasedRow]) -> None:
        by_entity = {(row.user_id, row.entity_id): row for row in rows}
        item_counts = await self._source.item_counts(kind, list(by_entity))
        filters = [
            PointFilter(row.user_id, _POINT_KINDS[kind], row.entity_id)
            for entity, row in by_entity.items()
            if row.wipe or entity not in item_counts
        ]
        if filters:
            await self._write(batch, Changes(delete_filters=filters))
        if kind == OutboxKind.SESSION and not self._indexes_messages:
            return
        ranges = [
            Range(*entity, row.since, min(row.through, item_counts[entity]))
            for entity, row in by_entity.items()
            if entity in item_counts
        ]
        for page in split_ranges(ranges, PAGE_ITEMS):
            await self._index_page(batch, kind, page, by_entity)
        if kind == OutboxKind.DOCUMENT:
            indexed = {
                entity: count
                for entity, count in item_counts.items()
                if by_entity[entity] not in batch.rejected
            }
            await self._source.set_document_status(indexed, DocumentStatus.INDEXED)

    async def _index_page(
        self,
        batch: _Batch,
        kind: OutboxKind,
        page: list[Range],
        by_entity: dict[EntityKey, LeasedRow],
    ) -> None:
        started_at, cpu_started_s = self._loop.time(), time.process_time()
        items = await self._source.items(kind, page)
        changes, rejections = await self._changes.build(_POINT_KINDS[kind], page, items)
        for entity, rejection in rejections.items():
            row = by_entity[entity]
            if rejection.is_final or row not in batch.rejected:
                batch.rejected[row] = rejection
        if changes.upserts or changes.deletes:
            for point in await self._write(batch, changes):
                row = by_entity[point.user_id, point.entity_id]
                batch.rejected[row] = Rejection(IndexFull.REASON, is_final=True)
        duration_s = self._loop.time() - started_at
        rest_s = pacing.rest_s(duration_s, time.process_time() - cpu_started_s, self._cores)
        await asyncio.sleep(min(rest_s, LEASE_S - LEASE_MARGIN_S))

    async def _write(self, batch: _Batch, changes: Changes) -> Sequence[Point]:
        """Write changes; return the new points for which the index has no room."""
        await self._ensure_lease(batch)
        # After the items were read: what the index holds was committed before this mark.
        mark = await self._epoch.raise_mark()
        self._require_same_history(batch, mark)
        refused = await self._writer.write(changes._replace(mark=mark), batch.building)
        self.stats.indexed += len(changes.upserts) - len(refused)
        return refused

    @staticmethod
    def _require_same_history(batch: _Batch, mark: Mark) -> None:
        """Check that the database has not lost what the index holds.

        Raises:
            IndexAhead: it may have.
        """
        if batch.index_mark is not None and is_index_ahead(batch.index_mark, mark):
            raise IndexAhead

    async def _ensure_lease(self, batch: _Batch) -> None:
        """Renew the lease if it could expire during the next write.

        Raises:
            LeaseLost: it has expired, and another process may have claimed rows.
        """
        if batch.lease_until - self._loop.time() > LEASE_MARGIN_S:
            return
        renewed_at = self._loop.time()
        renewed = await self._outbox.renew(batch.lease_id, batch.rows, LEASE_S)
        if len(renewed) < len(batch.rows):
            raise LeaseLost
        batch.lease_until = renewed_at + LEASE_S

    async def _finish_batch(self, batch: _Batch) -> None:
        """Delete the finished rows, and release the rejected ones for a later attempt."""
        unfinished = [row for row in batch.rows if row not in batch.rejected]
        for attempt in range(FINISH_ATTEMPTS):
            if unfinished:
                finished_keys = await self._outbox.finish(batch.lease_id, unfinished)
                unfinished = [row for row in unfinished if row[:3] not in finished_keys]
            if not unfinished:
                break
            # Appends have locked the remaining rows. If they stay locked, the lease expires and the
            # rows are processed again.
            await asyncio.sleep(0.005 * 2**attempt)
        for row, rejection in batch.rejected.items():
            await self._release_rejected(batch.lease_id, row, rejection)

    async def _release_rejected(self, lease_id: str, row: LeasedRow, rejection: Rejection) -> None:
        reason = rejection.reason
        attempt_count = MAX_ATTEMPTS - row.attempts if rejection.is_final else 1
        is_final = row.attempts + attempt_count >= MAX_ATTEMPTS
        if reason != IndexFull.REASON:  # Logged once, and not for each entity.
            _log.warning(
                "entity rejected by the index",
                kind=OutboxKind(row.kind).name,
                entity_id=row.entity_id,
                reason=reason,
                final=is_final,
            )
        retry_after_s = None if is_final else min(RETRY_CAP_S, RETRY_BASE_S * 2**row.attempts)
        await self._outbox.release(
            lease_id, [row], retry_after_s, attempts=attempt_count, detail=reason
        )
        if is_final and row.kind == OutboxKind.DOCUMENT:
            entity = (row.user_id, row.entity_id)
            chunk_counts = await self._source.item_counts(OutboxKind.DOCUMENT, [entity])
            await self._source.set_document_status(chunk_counts, DocumentStatus.FAILED, reason)
