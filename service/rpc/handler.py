"""`Handler`, the base of the classes that implement the RPCs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.errors import InvalidArgument
from service.rpc.call import Call
from service.rpc.conversion_turns import ConversionTurns
from service.rpc.page_tokens import PageTokens
from service.rpc.read_consistency import may_lag
from service.search.disabled import AnySearch
from service.store.append.appender import Appender
from service.store.bounded_reads import Connection
from service.store.db.database import Database
from service.store.db.read_batching import ReadBatcher
from service.store.db.readers import BatchReader, ConnectionReads, Reader
from service.store.db.replication import confirm_replication
from service.store.db.work_class import WorkClass
from service.store.replica import LaggingDatabase, NotReadFromReplica
from service.store.slices import Slices
from service.store.watch import WatchHub

T = TypeVar("T")


class Handler:
    """The parts of the server that RPCs use."""

    def __init__(
        self,
        database: Database,
        appender: Appender,
        watchers: WatchHub,
        search: AnySearch,
        *,
        call_timeout_s: float,
        page_token_key: str | None = None,
        lagging: LaggingDatabase | None = None,
    ) -> None:
        """Take the parts.

        Args:
            database: Runs the reads and the writes.
            appender: Writes the appended messages.
            watchers: The open WatchMessages streams.
            search: The search index, or its replacement where search is disabled.
            call_timeout_s: Timeout of each read of a stream, since a stream may have no deadline.
            page_token_key: Key of the page tokens; None for one of the database.
            lagging: Runs the reads that may lag; None if there is no replica.
        """
        self.database = database
        self.lagging = lagging
        self.reads = ReadBatcher(database)
        self.appender = appender
        self.watchers = watchers
        self.search = search
        self.call_timeout_s = call_timeout_s
        self.conversions = ConversionTurns()
        self.page_tokens = PageTokens(database, page_token_key)

    def reader(self, call: Call) -> Reader:
        """Return what runs the reads of a call: they may lag if the call accepts that.

        Raises:
            InvalidArgument: the call's metadata is invalid.
        """
        accepts_lag = may_lag(call)
        return self.lagging if accepts_lag and self.lagging is not None else self.database

    async def read_replica(
        self, read: Callable[[BatchReader], Awaitable[T]], owner_id: str, call: Call
    ) -> T | None:
        """Run the reads of a call on one connection of the replica, if the call accepts that.

        Args:
            read: Called with the connection, for each attempt.
            owner_id: The user in whose turn the call waits.
            call: The call.

        Returns:
            The result; None if the primary must be read.

        Raises:
            InvalidArgument: the call's metadata is invalid.
        """
        lagging = self.lagging
        if not may_lag(call) or lagging is None:
            return None
        held_bytes = call.held_bytes

        async def work(connection: Connection) -> T:
            call.release(call.held_bytes - held_bytes)  # Those of an earlier attempt.
            return await read(ConnectionReads(connection, lagging.large_reads))

        try:
            return await lagging.read_replica(work, owner_id=owner_id, deadline=call.deadline)
        except NotReadFromReplica:
            call.release(call.held_bytes - held_bytes)
            return None

    async def delete_in_slices(self, slices: Slices, owner_id: str, call: Call) -> int:
        """Delete rows slice by slice, until the remaining ones fit one transaction.

        Args:
            slices: The rows.
            owner_id: The user who owns the rows.
            call: The call that deletes; its deadline limits the whole deletion.

        Returns:
            The number of deleted rows.
        """
        count = 0
        while await self.database.read(
            slices.are_needed, owner_id=owner_id, deadline=call.deadline
        ):
            count += await self.database.write(
                slices.delete_next,
                owner_id=owner_id,
                deadline=call.deadline,
                work_class=WorkClass.EXPENSIVE,
            )
        return count

    async def confirm_absence(self, owner_id: str, call: Call) -> None:
        """Wait until the standbys have the deletion of what a repeated request did not find.

        Args:
            owner_id: The user in whose turn the call waits.
            call: The call that deletes.
        """
        await self.database.write(confirm_replication, owner_id=owner_id, deadline=call.deadline)


def require_same_id(field: str, inner_id: str, request_id: str) -> None:
    """Check that the id inside a resource is empty or the request's.

    Raises:
        InvalidArgument: it is another id; names `field`.
    """
    if inner_id and inner_id.lower() != request_id:
        raise InvalidArgument.field(field, "must be empty or equal to the request's")
