"""Reads that arrive while a statement is under way share the next one.

A round trip costs the driver and the event loop more than the rows do: sixteen pages in one statement take a third of the CPU time of
sixteen statements. Nothing waits when idle: the first read leaves at once, by itself, and those that come meanwhile leave together.
A batched statement joins the requests' arguments (`unnest`) with the rows that each of them reads (LATERAL), each under its own
user's id. The query of a read is written once, as a function of its parameters, next to the code that uses it.
"""

from __future__ import annotations

import asyncio
from collections import deque
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
from service.store.db.database import DATABASE_ERRORS, Database
from service.store.db.db_errors import sqlstate
from service.store.db.hot_pool import Statement

MAX_BATCH_SIZE = 16
"""Reads in one statement: each may return a page of 3 MiB."""
MAX_IN_FLIGHT = 4
"""Statements of one kind under way at once, at the most: the second and later ones leave full, or because the first is slow."""
SLOW_STATEMENT_S = 0.01
"""Seconds after which those who wait for the statement under way leave in another."""

Rows = Sequence[Any]
"""Each a sequence of columns."""


Types = Mapping[str, TypeEngine[Any]]
"""The names and types of a read's parameters."""


class Parameters:
    """The parameters of a query: bind parameters of a single read, or columns of the table of batched requests."""

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
    """

    def __init__(self, query: Query, types: Types) -> None:
        self.single = Statement(query(Parameters.bound(types)))
        # In the order of the single statement's arguments, so that a batch is a transposition of them.
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


class _Asked(NamedTuple):
    arguments: tuple[Any, ...]
    answer: asyncio.Future[Rows]


class ReadBatcher:
    """The shared reads of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lines: dict[BatchedRead, _ReadQueue] = {}

    async def fetch(self, read: BatchedRead, deadline: float, **values: Any) -> Rows:
        """Run one read, alone or with others of its kind, and return its rows.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `Database.fetch`.
        """
        line = self._lines.get(read)
        if line is None:
            line = self._lines[read] = _ReadQueue(self.database, read)
        return await line.fetch(read.single.bind(**values), deadline)


class _ReadQueue:
    """Those who wait for reads of one kind."""

    def __init__(self, database: Database, read: BatchedRead) -> None:
        self._database = database
        self._read = read
        self._queue: deque[_Asked] = deque()
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._gather = BatchWindow()
        self._shares = True
        """False once the database has refused the shared statement: Citus takes no LATERAL … LIMIT over several users."""

    async def fetch(self, arguments: tuple[Any, ...], deadline: float) -> Rows:
        """Leave alone when nothing is under way and nothing was, else with the next shared statement."""
        if not self._shares or (not self._under_way and self._gather.last <= 1):
            self._under_way += 1
            try:
                return await self._database.fetch(self._read.single, *arguments, deadline=deadline)
            finally:
                self._under_way -= 1
                self._go_on()
        asked = _Asked(arguments, self._loop.create_future())
        self._queue.append(asked)
        self._go_on()
        try:
            return await asked.answer
        except _RunAlone:
            return await self._database.fetch(self._read.single, *arguments, deadline=deadline)

    def _go_on(self, *, slow: bool = False) -> None:
        full = len(self._queue) >= MAX_BATCH_SIZE
        if self._queue and (
            not self._under_way or ((full or slow) and self._under_way < MAX_IN_FLIGHT)
        ):
            self._under_way += 1
            task = self._loop.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        try:
            while self._queue:
                await self._gather.wait(self._queue, MAX_BATCH_SIZE)
                if batch := self._take():
                    slow = self._loop.call_later(SLOW_STATEMENT_S, lambda: self._go_on(slow=True))
                    try:
                        await self._together(batch)
                    finally:
                        slow.cancel()
        finally:
            # At once, and not when the task's callbacks run: who comes between must find a place or somebody who will take it along.
            self._under_way -= 1

    def _take(self) -> list[_Asked]:
        batch: list[_Asked] = []
        while self._queue and len(batch) < MAX_BATCH_SIZE:
            asked = self._queue.popleft()
            if not asked.answer.done():  # Else the caller is gone.
                batch.append(asked)
        return batch

    async def _together(self, batch: list[_Asked]) -> None:
        arguments = [
            list(column) for column in zip(*(asked.arguments for asked in batch), strict=True)
        ]
        try:
            rows = await self._database.fetch_once(
                self._read.batched, list(range(len(batch))), *arguments
            )
        except Exception as error:  # noqa: BLE001 - a defect must fail those who wait, not hang them
            known = isinstance(error, DATABASE_ERRORS)
            if known and sqlstate(error) == "0A000":
                self._shares = False
            for asked in batch:
                if not asked.answer.done():
                    asked.answer.set_exception(_RunAlone() if known else error)
            return
        found: list[list[Sequence[Any]]] = [[] for _ in batch]
        for row in rows:
            found[row[0]].append(row[1:])
        for asked, mine in zip(batch, found, strict=True):
            if not asked.answer.done():
                asked.answer.set_result(mine)


class _RunAlone(Exception):
    """The shared statement has failed: each tries again by itself, within its own deadline."""
