"""The part of a database that reads need, also of a replica and of a single connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.hot_pool import fetch_on
from service.store.db.read_batching import BatchedRead, Rows
from service.store.db.recent_keys import RecentKeys
from service.store.db.work_class import WorkClass

T = TypeVar("T")


class Reader(Protocol):
    """Runs work that only reads; `Database` does."""

    @property
    def large_reads(self) -> RecentKeys:
        """Users with large hot reads, and contexts and lists that were large."""

    async def read(
        self,
        work: Callable[[AsyncConnection], Awaitable[T]],
        *,
        owner_id: str,
        deadline: float,
        work_class: WorkClass = WorkClass.ORDINARY,
    ) -> T:
        """Run statements that change nothing; see `Database.read`."""


class BatchReader(Protocol):
    """Runs the reads that can be batched; `ReadBatcher` does."""

    @property
    def database(self) -> Reader:
        """Runs all other reads."""

    async def fetch(self, read: BatchedRead, deadline: float, **values: Any) -> Rows:
        """Run one read, and return its rows; see `ReadBatcher.fetch`."""


class ConnectionReads:
    """The reads of one call on one connection.

    Each of them sees at least what those before it saw. Several servers of a replica do not promise
    that.
    """

    def __init__(self, connection: AsyncConnection, large_reads: RecentKeys) -> None:
        """Take a connection in a transaction, which decides about deadlines and permits."""
        self.large_reads = large_reads
        self._connection = connection

    @property
    def database(self) -> Reader:
        """The same connection."""
        return self

    async def fetch(
        self,
        read: BatchedRead,
        deadline: float,  # noqa: ARG002 - that of the transaction holds
        **values: Any,
    ) -> Rows:
        """Run one read alone."""
        return await fetch_on(self._connection, read.single, *read.single.bind(**values))

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]], **_options: Any) -> T:
        """Run work in the transaction of the connection."""
        return await work(self._connection)
