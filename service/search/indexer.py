"""Works off what the index owes: takes rows of the outbox, reads what PostgreSQL says now, embeds, writes, and removes the rows.

No transaction is open across a call of the index or the embeddings. A row is leased, so that of several replicas one works on it at a
time, and nothing is written that could arrive after the lease has ended. It wakes at its start and on this process's own commits; it
sets itself a timer only while rows wait, so that an idle service asks the database nothing.
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
from service.search.types import (
    Changes,
    IndexingStats,
    InputRejected,
    Point,
    PointFilter,
    PointKind,
    SearchOverloaded,
    SearchUnavailable,
    VectorIndex,
)
from service.store.db.database import DATABASE_ERRORS, Database, backoff
from service.store.outbox import index_source
from service.store.outbox.index_source import Item, Range
from service.store.outbox.outbox import MAX_ATTEMPTS, Backlog, LeasedRow, Outbox
from service.store.outbox.reindex_state import ReindexState
from service.store.tables import DocumentStatus, OutboxKind

CLAIM = 256
"""Rows taken at a time."""
PAGE = 128
"""Items read, embedded and written at a time: a search waits for one such batch at the most."""
LEASE = 60.0
"""Seconds that a row is ours."""
MARGIN = 30.0
"""Seconds of the lease that must be left when something is written: longer than a write can take."""
RETRY_BASE, RETRY_CAP = 1.0, 60.0
RECHECK = 5.0
"""Seconds between two looks at rows that others hold, at the least."""
GATHER = 0.02
"""Seconds to wait after a commit for others, so that they are indexed together."""
PACE = 0.25
"""The same while commits come all the time: a session that grows is then taken a few times a second, not at every message."""
BACKLOG_AGE = 2.0
"""Seconds that something may wait before there is no more gathering."""

_KIND = {OutboxKind.DOCUMENT: PointKind.CHUNK, OutboxKind.SESSION: PointKind.MESSAGE}

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Batch:
    """Rows that were taken together, and what has become of them."""

    lease_id: str
    until: float
    rows: list[LeasedRow]
    building: str | None
    refused: dict[LeasedRow, str] = field(default_factory=dict)
    """Rows of which something was refused, and why."""


class LeaseLost(Exception):
    """Somebody else may be at work on the same rows by now."""


class Indexer:
    """One for each server process."""

    def __init__(
        self,
        database: Database,
        index: VectorIndex,
        embeddings: Embeddings,
        alias: str,
        *,
        dimensions: int,
        messages: bool,
        on_down: Callable[[str], None],
    ) -> None:
        self._database = database
        self._outbox = Outbox(database)
        self._rebuilding = ReindexState(database, alias)
        self._index = index
        self._embeddings = embeddings
        self._dimensions = dimensions
        self._messages = messages
        self._on_down = on_down
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.Event()
        self._cores = pacing.usable_cores()
        self._task: asyncio.Task[None] | None = None
        self._goes_on = True
        """Whether the rows that were taken last are done."""
        self.stats = IndexingStats()

    def start(self) -> None:
        """Begin with what is owed, unless it is at work."""
        self._work.set()
        if self._task is not None and not self._task.done():
            return
        self._task = self._loop.create_task(self._run())

    async def stop(self) -> None:
        """Stop after what is under way is written, or put back; what is left waits for the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def wake(self) -> None:
        """Look at the outbox: something was committed."""
        self._work.set()
        if self.stats.oldest_pending_at is None:
            self.stats.oldest_pending_at = time.monotonic()
            self.stats.pending += 1

    async def _run(self) -> None:
        attempt = 0
        while True:
            try:
                wait = await self._drain()
                attempt = 0
            except asyncio.CancelledError:
                raise
            except SearchOverloaded:
                attempt += 1
                wait = backoff(attempt, base=0.5, cap=30.0) + 0.5
            except SearchUnavailable as error:
                # The supervisor asks the index until it answers, and starts us anew.
                self._on_down(str(error))
                return
            except Exception as error:  # noqa: BLE001 - the worker must outlive whatever a row does to it
                if not isinstance(error, (*DATABASE_ERRORS, LeaseLost)):
                    _log.error("indexing failed", error=type(error).__name__, exc_info=True)
                attempt += 1
                wait = backoff(attempt, base=0.5, cap=30.0) + 0.1
            await self._sleep(wait)

    async def _sleep(self, seconds: float | None) -> None:
        """Wait for work, at most so long; None: until something is committed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._work.wait()
        await asyncio.sleep(GATHER)

    async def _drain(self) -> float | None:
        """Work until nothing is due; return the seconds until something is, or None."""
        self._work.clear()
        looked = self._loop.time()
        while await self._step():
            if self.stats.lag_s < BACKLOG_AGE:
                await asyncio.sleep(PACE)
            if self._loop.time() - looked > RECHECK:
                await self._look()
                looked = self._loop.time()
        backlog = await self._look()
        if backlog.next_due_s is None:
            return None
        return (
            max(backlog.next_due_s, 0.05)
            if backlog.next_due_s < RECHECK
            else max(RECHECK, backlog.next_due_s / 2)
        )

    async def _look(self) -> Backlog:
        """Count what is owed."""
        backlog = await self._outbox.backlog()
        stats = self.stats
        stats.pending, stats.failed = backlog.pending, backlog.failed
        stats.oldest_pending_at = (
            time.monotonic() - backlog.oldest_age_s if backlog.pending else None
        )
        return backlog

    async def _step(self) -> bool:
        """Take rows and work them off; False when none was due."""
        batch = _Batch(str(uuid.uuid4()), self._loop.time() + LEASE, [], None)
        batch.rows = await self._outbox.claim(batch.lease_id, LEASE, CLAIM)
        if not batch.rows:
            return False
        taken = time.monotonic() - max(row.age_s for row in batch.rows)
        # What has failed before these rows were taken still waits, and may not be among them.
        oldest = self.stats.oldest_pending_at
        self.stats.oldest_pending_at = (
            taken if oldest is None or self._goes_on else min(oldest, taken)
        )
        self._goes_on = False
        try:
            # Read after the rows were taken: whoever starts to build a collection meanwhile owes every row anew.
            batch.building = await self._rebuilding.building_collection()
            await self._do(batch)
        except (SearchUnavailable, asyncio.CancelledError, *DATABASE_ERRORS):
            await asyncio.shield(self._release_batch(batch))
            raise
        except InputRejected as error:
            await self._find_refused(batch, str(error))
        await self._finish_batch(batch)
        self._goes_on = True
        return True

    async def _release_batch(self, batch: _Batch) -> None:
        with suppress(*DATABASE_ERRORS):
            await self._outbox.release(batch.lease_id, batch.rows, 0.0)

    async def _find_refused(self, batch: _Batch, words: str) -> None:
        """Do each row apart, so that one that is refused holds nobody up."""
        rows = batch.rows
        for row in rows:
            try:
                batch.rows = [row]
                await self._do(batch)
            except InputRejected as error:
                batch.refused[row] = str(error) if len(rows) > 1 else words
            except (SearchUnavailable, asyncio.CancelledError, *DATABASE_ERRORS):
                batch.rows = rows
                await asyncio.shield(self._release_batch(batch))
                raise
        batch.rows = rows

    async def _do(self, batch: _Batch) -> None:
        """Bring the index to what PostgreSQL says of these rows."""
        gone = [PointFilter(row.user_id) for row in batch.rows if row.kind == OutboxKind.USER]
        if gone:
            await self._write(batch, Changes(wipes=gone))
        for kind in (OutboxKind.DOCUMENT, OutboxKind.SESSION):
            rows = [row for row in batch.rows if row.kind == kind]
            if rows:
                await self._bring(batch, kind, rows)

    async def _bring(self, batch: _Batch, kind: OutboxKind, rows: list[LeasedRow]) -> None:
        there = await index_source.read_item_counts(
            self._database, kind, [(row.user_id, row.entity_id) for row in rows]
        )
        wipes = [
            PointFilter(row.user_id, _KIND[kind], row.entity_id)
            for row in rows
            if row.wipe or (row.user_id, row.entity_id) not in there
        ]
        if wipes:
            await self._write(batch, Changes(wipes=wipes))
        if kind == OutboxKind.SESSION and not self._messages:
            return
        by_entity = {
            (row.user_id, row.entity_id): row
            for row in rows
            if (row.user_id, row.entity_id) in there
        }
        ranges = (
            Range(*entity, row.since, min(row.through, there[entity]))
            for entity, row in by_entity.items()
        )
        for page in index_source.split_ranges(ranges, PAGE):
            started, used = self._loop.time(), time.process_time()
            changes, refused = await self._changes(
                _KIND[kind], page, await index_source.read_items(self._database, kind, page)
            )
            batch.refused |= {by_entity[entity]: words for entity, words in refused.items()}
            if changes.points or changes.deletes:
                await self._write(batch, changes)
            rest_s = pacing.rest_s(
                self._loop.time() - started, time.process_time() - used, self._cores
            )
            await asyncio.sleep(min(rest_s, LEASE - MARGIN))
        if kind == OutboxKind.DOCUMENT:
            done = {
                entity: there[entity]
                for entity, row in by_entity.items()
                if row not in batch.refused
            }
            await index_source.set_document_status(self._database, done, DocumentStatus.INDEXED)

    async def _changes(
        self, kind: PointKind, ranges: Sequence[Range], items: Sequence[Item]
    ) -> tuple[Changes, dict[tuple[str, str], str]]:
        """Embed what has a text; what has none, or is refused, must not be found.

        Returns:
            What to change, and by entity why something of it is refused.
        """
        wanted = [item.text or "" for item in items if item.vector is None and not item.is_blank]
        made = iter(await self._embed(wanted))
        deletes: list[Point] = []
        points: list[Point] = []
        vectors: list[bytes] = []
        refused: dict[tuple[str, str], str] = {}
        for item in items:
            owner = ranges[item.range_index]
            point = Point(owner.user_id, kind, owner.entity_id, item.key)
            vector: bytes | str = b""
            if not item.is_blank:
                vector = next(made) if item.vector is None else self._fitting(item.vector)
            if isinstance(vector, str):
                refused[owner.user_id, owner.entity_id] = vector
            if vector and isinstance(vector, bytes):
                points.append(point)
                vectors.append(vector)
            else:
                deletes.append(point)
        return Changes((), deletes, points, b"".join(vectors)), refused

    def _fitting(self, vector: bytes) -> bytes | str:
        """Return a vector that was given, or why it is refused."""
        if len(vector) == self._dimensions * 4:
            return vector
        return f"the given vectors have dimension {len(vector) // 4}, and the index has {self._dimensions}"

    async def _embed(self, texts: Sequence[str]) -> list[bytes | str]:
        """Return the vectors of texts, or why one is refused: the others are taken all the same."""
        if not texts:
            return []
        try:
            made = await self._embeddings.embed(texts)
        except InputRejected as error:
            if len(texts) == 1:
                return [str(error)]
            half = len(texts) // 2
            return await self._embed(texts[:half]) + await self._embed(texts[half:])
        size = self._dimensions * 4
        if len(made) != size * len(texts):
            raise SearchUnavailable("the embeddings have another dimension than the index")
        return [made[n : n + size] for n in range(0, len(made), size)]

    async def _write(self, batch: _Batch, changes: Changes) -> None:
        await self._hold(batch)
        await self._index.write(changes, batch.building)
        self.stats.indexed += len(changes.points)

    async def _hold(self, batch: _Batch) -> None:
        """Make sure that the lease outlives the next write.

        Raises:
            LeaseLost: it has ended, and another may be at work.
        """
        if batch.until - self._loop.time() > MARGIN:
            return
        asked = self._loop.time()
        ours = await self._outbox.renew(batch.lease_id, batch.rows, LEASE)
        if len(ours) < len(batch.rows):
            raise LeaseLost
        batch.until = asked + LEASE

    async def _finish_batch(self, batch: _Batch) -> None:
        """Remove what is done, and put back what was refused."""
        left = [row for row in batch.rows if row not in batch.refused]
        for attempt in range(6):
            if left:
                reached = await self._outbox.finish(batch.lease_id, left)
                left = [row for row in left if row[:3] not in reached]
            if not left:
                break
            # An append holds them at this moment. If that goes on, the lease ends by itself and they are done again.
            await asyncio.sleep(0.005 * 2**attempt)
        for row, words in batch.refused.items():
            final = row.attempts + 1 >= MAX_ATTEMPTS
            _log.warning(
                "refused by the index",
                owed=OutboxKind(row.kind).name,
                entity_id=row.entity_id,
                reason=words,
                final=final,
            )
            pause = None if final else min(RETRY_CAP, RETRY_BASE * 2**row.attempts)
            await self._outbox.release(batch.lease_id, [row], pause, attempts=1, detail=words)
            if final and row.kind == OutboxKind.DOCUMENT:
                key = (row.user_id, row.entity_id)
                there = await index_source.read_item_counts(
                    self._database, OutboxKind.DOCUMENT, [key]
                )
                await index_source.set_document_status(
                    self._database, there, DocumentStatus.FAILED, words
                )
