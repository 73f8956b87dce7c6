"""The behaviour of every asyncpg connection of the service, direct or to a pooler."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import asyncpg

from service.store.db.db_errors import CommitNotReplicated, WrongRole

LOCK_TIMEOUT_S = 0.2
"""Seconds that a transaction waits for a lock before it releases its connection and is retried."""
# The driver counts statements from 1 in each process. Behind a pooler that was not recognized, a
# name must never find the statement of another process.
_STATEMENT_PREFIX = f"chat_{secrets.token_hex(4)}"


def _note_cancelled_wait(connection: Any, message: asyncpg.PostgresLogMessage) -> None:
    # By the function that sends it, since its text is translated. It is the only message of that
    # function: a wait for the synchronous standbys was cancelled, and COMMIT is going to succeed.
    if message.server_source_function == "SyncRepWaitForLSN":
        connection.is_unreplicated = True


class DriverConnection(asyncpg.Connection):
    """An asyncpg connection that sets a transaction's lock timeout in the same round trip as BEGIN.

    A transaction pooler rejects it as a start-up parameter, and a separate statement would cost
    each write a round trip.

    It also notices the warning that the wait for the synchronous standbys was cancelled. The driver
    calls the listener before the caller of the statement goes on: it schedules both, in the order
    of the server's messages.
    """

    __slots__ = ("is_reading", "is_unreplicated")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_reading = False
        """Whether the transactions only read, and a standby behind a pooler must reject them."""
        self.is_unreplicated = False
        """Whether the last commit is stored on this server only, although standbys must have it."""
        self.add_log_listener(_note_cancelled_wait)

    def _get_unique_id(self, prefix: str) -> str:
        own: str = super()._get_unique_id(prefix)  # type: ignore[misc] # missing in the stubs
        return f"{_STATEMENT_PREFIX}{own}"

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if query.startswith("BEGIN"):
            self.is_unreplicated = False  # Of a commit whose caller did not wait for its end.
            query += f" SET LOCAL lock_timeout = {LOCK_TIMEOUT_S * 1000:.0f};"
        return await super().execute(query, *args, timeout=timeout)

    def check_replicated(self) -> None:
        """Check that the last commit was not one whose wait for the standbys was cancelled.

        Raises:
            CommitNotReplicated: the commit is stored on this server, and must not be acknowledged.
        """
        if self.is_unreplicated:
            self.is_unreplicated = False
            raise CommitNotReplicated("the wait for the synchronous standbys was cancelled")


class PoolerConnection(DriverConnection):
    """A connection to a pooler, which cancels a statement by closing the connection.

    asyncpg would send a cancel request on a connection of its own. PgBouncer 1.18 exits when the
    client of such a request disconnects too early (github.com/pgbouncer/pgbouncer/issues/801),
    which ends the connections of all its clients.

    The connection may outlive a failover behind the pooler. A read must return everything that was
    acknowledged before, so its transactions begin in a way that a standby rejects. Writes do not
    need that, and would override `default_transaction_read_only`.
    """

    __slots__ = ()

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if not (self.is_reading and query.startswith("BEGIN")):
            return await super().execute(query, *args, timeout=timeout)
        query = query.replace("BEGIN", "BEGIN READ WRITE", 1)
        try:
            return await super().execute(query, *args, timeout=timeout)
        except asyncpg.FeatureNotSupportedError:
            raise WrongRole("a standby") from None

    async def _cancel(
        self, waiter: asyncio.Future[None], cancel_waiter: asyncio.Future[None] | None = None
    ) -> None:
        self.terminate()
        for future in (waiter, cancel_waiter):
            if future is not None and not future.done():
                future.set_result(None)
