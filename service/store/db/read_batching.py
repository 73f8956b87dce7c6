"""Batches reads that arrive while a statement is in flight: the next statement serves all of them.

A round trip costs the driver and the event loop more than the rows do: 16 pages in one statement
take a third of the CPU time of 16 statements. Without load nothing waits: a read that arrives alone
is sent alone and immediately.

A batched statement joins the requests' arguments (`unnest`) with the rows that each of them reads
(LATERAL), each under its own user's id. The query of a read is written once, as a function of its
parameters, next to the code that uses it.

Users take turns in a batch. A user whose last read was large shares no statement with others, who
would wait for these rows: such reads are sent alone, and one of each user at a time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Integer,
    Select,
    bindparam,
    column,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.types import TypeEngine

from service.store.db.batch_window import BatchWindow
from service.store.db.database import NO_OWNER, Database
from service.store.db.db_errors import DATABASE_ERRORS, FEATURE_NOT_SUPPORTED, sqlstate
from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore
from service.store.db.hot_pool import Statement
from service.store.db.work_class import overloaded_error

MAX_BATCH_SIZE = 16
"""Reads in one statement."""
LARGE_ROWS = 200
LARGE_BYTES = 128 * 1024
"""A read with more rows, or with more bytes of rows, is large."""
MAX_ROWS_PER_USER = 800
"""Rows for which one user's reads in a statement ask, unless it is a single read: users who ask for
large pages must not make others wait before the first of these has shown that it is large."""
LARGE_IN_FLIGHT = 2
"""Large reads in flight, of different users."""
MAX_IN_FLIGHT = 4
"""Statements of one kind in flight; more than one only if a batch is full or a statement slow."""
NEXT_BATCH_AFTER_S = 0.01
"""Seconds after which reads no longer wait for the statement in flight."""

Rows = Sequence[Any]
"""Rows, each a sequence of columns."""
Types = Mapping[str, TypeEngine[Any]]
"""The names and types of a read's parameters."""


class Parameters:
    """A query's parameters: bind parameters of a single read, columns of a batch's requests."""

    def __init__(
        self, columns: Mapping[str, ColumnElement[Any]], tables: tuple[FromClause, ...] = ()
    ) -> None:
        self._columns = columns
        self.tables = tables
        """For `Select.correlate`: every SELECT that uses a parameter must name them."""

    def __getitem__(self, name: str) -> ColumnElement[Any]:
        return self._columns[name]

    @classmethod
    def bound(cls, types: Types) -> Parameters:
        """Make bind parameters."""
        return cls({name: bindparam(name, type_=type_) for name, type_ in types.items()})


Query = Callable[[Parameters], Select[Any] | CompoundSelect[Any]]


class BatchedRead:
    """One kind of read, as a statement for a single request and as one for a batch of them.

    Args:
        query: Builds the SELECT from its parameters.
        types: The parameters; the batched statement takes an array of each.
        size_column: Index of the column with the size of a row in bytes, if there is one.
    """

    def __init__(self, query: Query, types: Types, *, size_column: int | None = None) -> None:
        self.size_column = size_column
        self.single = Statement(query(Parameters.bound(types)))
        # In the order of the single statement's arguments: a batch's arguments are their transpose.
        columns: Types = {"request_index": Integer()} | {
            name: types[name] for name in self.single.names
        }
        requests = (
            func.unnest(
                *(bindparam(name, type_=ARRAY(type_)) for name, type_ in columns.items()),
            )
            .table_valued(*(column(name, type_) for name, type_ in columns.items()))
            .render_derived("requests")
        )
        rows = query(Parameters({name: requests.c[name] for name in types}, (requests,))).lateral(
            "results"
        )
        # `results.*`, since two columns of a result may have one name.
        self.batched = Statement(
            select(requests.c.request_index, literal_column("results.*")).select_from(
                requests.join(rows, true())
            )
        )


class _Request(NamedTuple):
    owner_id: str
    limit: int
    """Maximum number of rows."""
    arguments: tuple[Any, ...]
    future: asyncio.Future[Rows]


class ReadBatcher:
    """Batches the reads of one database, each kind of read in a queue of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._queues: dict[BatchedRead, _ReadQueue] = {}
        self._large_permits = FairSemaphore(LARGE_IN_FLIGHT, max_held_per_owner=1)
        self._loop = asyncio.get_running_loop()

    async def fetch(self, read: BatchedRead, deadline: float, **values: Any) -> Rows:
        """Run one read, alone or in a batch, and return its rows.

        Args:
            read: The kind of read.
            deadline: A time of the running loop's clock, in seconds.
            values: The read's parameters. The user in `user_id` is the one in whose turn it waits.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `Database.fetch`.
            Overloaded: the user's large reads took until the deadline.
        """
        owner_id = values.get("user_id", NO_OWNER)
        arguments = read.single.bind(**values)
        large_reads = self.database.large_reads
        if owner_id not in large_reads:
            queue = self._queues.get(read)
            if queue is None:
                queue = self._queues[read] = _ReadQueue(self.database, read)
            try:
                rows = await queue.fetch(owner_id, values.get("limit", 1), arguments, deadline)
            except _IsLarge:
                pass  # An earlier read of the user was.
            else:
                if len(rows) > LARGE_ROWS:
                    large_reads.add(owner_id)
                return rows
        try:
            async with self._large_permits.hold(owner_id, deadline - self._loop.time()):
                rows = await self.database.fetch(read.single, *arguments, deadline=deadline)
        except AcquireTimeout:
            raise overloaded_error() from None
        if len(rows) <= LARGE_ROWS and _total_bytes(rows, read.size_column) <= LARGE_BYTES:
            large_reads.discard(owner_id)
        return rows


def _total_bytes(rows: Rows, size_column: int | None) -> int:
    if size_column is None:
        return 0
    return sum(row[size_column] or 0 for row in rows)


class _RequestQueue:
    """Requests of several users, who take turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[_Request]] = OrderedDict()
        """The requests of each user; the user in front is next."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, request: _Request) -> None:
        queue = self._queues.get(request.owner_id)
        if queue is None:
            queue = self._queues[request.owner_id] = deque()
        queue.append(request)
        self._size += 1

    def take(self, max_size: int) -> list[_Request]:
        """Remove up to `max_size` requests, in rotation between the users, for one statement."""
        taken: list[_Request] = []
        row_counts: dict[str, int] = {}
        full: dict[str, deque[_Request]] = {}
        queues = self._queues
        while queues and len(taken) < max_size:
            owner_id, queue = next(iter(queues.items()))
            row_count = row_counts.get(owner_id, 0)
            if row_count and row_count + queue[0].limit > MAX_ROWS_PER_USER:
                full[owner_id] = queues.pop(owner_id)
                continue
            request = queue.popleft()
            row_counts[owner_id] = row_count + request.limit
            taken.append(request)
            if queue:
                queues.move_to_end(owner_id)
            else:
                del queues[owner_id]
        queues.update(full)
        self._size -= len(taken)
        return taken


class _ReadQueue:
    """The waiting reads of one kind, and the tasks that send them."""

    def __init__(self, database: Database, read: BatchedRead) -> None:
        self._database = database
        self._read = read
        self._queue = _RequestQueue()
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._window = BatchWindow()
        self._is_batching_supported = True
        """False once the database has rejected the batched statement, as Citus does: it supports no
        LATERAL with LIMIT over several users."""

    async def fetch(
        self, owner_id: str, limit: int, arguments: tuple[Any, ...], deadline: float
    ) -> Rows:
        """Send a read alone if none is in flight and the last batch was one read, else queue it.

        Without support for batches, every read is sent alone.

        Raises:
            _IsLarge: another read of the user, which was large, has ended while this one waited.
        """
        is_alone = not self._in_flight and self._window.last_size <= 1
        if is_alone or not self._is_batching_supported:
            self._in_flight += 1
            try:
                return await self._fetch_single(arguments, deadline)
            finally:
                self._in_flight -= 1
                self._start_batch()
        request = _Request(owner_id, limit, arguments, self._loop.create_future())
        self._queue.append(request)
        self._start_batch()
        try:
            return await request.future
        except _BatchFailed:
            return await self._fetch_single(arguments, deadline)

    async def _fetch_single(self, arguments: tuple[Any, ...], deadline: float) -> Rows:
        return await self._database.fetch(self._read.single, *arguments, deadline=deadline)

    def _start_batch(self, *, is_slow: bool = False) -> None:
        """Start a task that empties the queue, unless that can wait for a statement in flight."""
        is_due = is_slow or len(self._queue) >= MAX_BATCH_SIZE
        if self._queue and (not self._in_flight or (is_due and self._in_flight < MAX_IN_FLIGHT)):
            self._in_flight += 1
            task = self._loop.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        try:
            while self._queue:
                await self._window.wait(self._queue, MAX_BATCH_SIZE)
                if batch := self._take_batch():
                    timer = self._loop.call_later(
                        NEXT_BATCH_AFTER_S, lambda: self._start_batch(is_slow=True)
                    )
                    try:
                        await self._run_batch(batch)
                    finally:
                        timer.cancel()
        finally:
            # Not in a callback of the task, which runs later: a read that arrived in between would
            # find a statement in flight, and no task that sends the read.
            self._in_flight -= 1

    def _take_batch(self) -> list[_Request]:
        """Remove up to MAX_BATCH_SIZE requests whose callers still wait from the queue."""
        batch: list[_Request] = []
        large_reads = self._database.large_reads
        while self._queue and not batch:
            for request in self._queue.take(MAX_BATCH_SIZE):
                if request.future.done():
                    continue
                if request.owner_id in large_reads:
                    request.future.set_exception(_IsLarge())
                else:
                    batch.append(request)
        return batch

    async def _run_batch(self, batch: list[_Request]) -> None:
        arguments = [
            list(values) for values in zip(*(request.arguments for request in batch), strict=True)
        ]
        try:
            records = await self._database.fetch_once(
                self._read.batched, list(range(len(batch))), *arguments, is_reading=True
            )
        except Exception as error:  # noqa: BLE001 - a defect must fail the callers, not hang them
            is_database_error = isinstance(error, DATABASE_ERRORS)
            if is_database_error and sqlstate(error) == FEATURE_NOT_SUPPORTED:
                self._is_batching_supported = False
            for request in batch:
                if not request.future.done():
                    request.future.set_exception(_BatchFailed() if is_database_error else error)
            return
        rows: list[list[Sequence[Any]]] = [[] for _ in batch]
        for record in records:
            rows[record[0]].append(record[1:])
        for request, own_rows in zip(batch, rows, strict=True):
            if len(batch) > 1 and _total_bytes(own_rows, self._read.size_column) > LARGE_BYTES:
                self._database.large_reads.add(request.owner_id)
            if not request.future.done():
                request.future.set_result(own_rows)


class _IsLarge(Exception):
    """The read must not be sent with those of other users."""


class _BatchFailed(Exception):
    """The batched statement failed: each read is retried alone, within its own deadline."""
