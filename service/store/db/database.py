"""The engine: connections, transactions, retries, and the evidence of whether the database answers.

Three ways in, by what a call needs:
- `fetch`: one hot statement by the driver itself;
- `read`: SQLAlchemy statements that change nothing;
- `write`: a transaction, retried whole, and carried to its end when the caller goes away meanwhile.

A deadline is a time of the running loop's clock (`loop.time()`), in seconds. No work is started that cannot finish by then.
"""

from __future__ import annotations

import asyncio
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import NullPool, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from service.errors import DeadlineExceeded, ServiceError, Unavailable
from service.store.db.db_errors import Failure, classify, to_service_error
from service.store.db.dsn import Target
from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore
from service.store.db.hot_pool import (
    LOCK_TIMEOUT_S,
    DriverConnection,
    HotPool,
    PoolerConnection,
    Record,
    Statement,
    fetch_in_transaction,
)
from service.store.schema.version import SchemaVersion, schema_version

T = TypeVar("T")

Work = Callable[[AsyncConnection], Awaitable[T]]
"""Statements to run on one connection; may be called once per attempt."""

NO_OWNER = "no owner"
"""Owner id for work that concerns no single user, such as listing users: it waits in a queue of its own."""

PING_AFTER_IDLE_S = 30.0
"""Seconds after which an idle connection is tried before use."""
COMMAND_TIMEOUT_S = 60.0
"""Seconds after which the driver gives any statement up, whatever its caller's deadline."""
SUSPICIOUS_WAIT_S = 0.5
"""Seconds that a call waits for the database before its giving up casts doubt on it."""
MAX_ATTEMPTS = 6
"""Tries of a transaction that meets contention."""
OUTAGE_TIMEOUT_S = 15.0
"""Seconds that a call waits at the most for a database that is away."""
REPLY_MARGIN_S = 0.25
"""Seconds before its deadline at which a call that waits for the database is answered, so that the answer arrives."""
CLOSE_TIMEOUT_S = 1.0
"""Seconds that connections get to be closed in good order."""
MIN_OTHER_CONNECTIONS = 2
"""Connections that are left for all else, where the pool is small, when the hot statements have theirs."""

# What the driver, SQLAlchemy and the socket raise when a statement or a connection fails.
DATABASE_ERRORS = (
    DBAPIError, PoolTimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError,
)  # fmt: skip


def backoff(attempt: int, *, base: float = 0.02, cap: float = 1.0) -> float:
    """Return how long to wait before the next attempt, in seconds: full jitter, so that retries spread out."""
    return random.uniform(0, min(cap, base * 2**attempt))  # noqa: S311 - spreads load, keeps no secret


def outage_deadline(deadline: float, now: float) -> float:
    """Return when a call stops waiting for a database that is away; all are times of the running loop's clock, in seconds."""
    return min(deadline - min(REPLY_MARGIN_S, (deadline - now) / 4), now + OUTAGE_TIMEOUT_S)


class Database:
    """One PostgreSQL, reached through one pool.

    The pool's connections are shared out, so that nobody's waits are everybody's: some are for the hot statements alone (`driver`), the
    rest is given to users in turn, and of that rest a third is never held by transactions, which may wait for locks.
    """

    def __init__(
        self,
        target: Target,
        *,
        pool_size: int = 8,
        max_overflow: int = 4,
        pool_timeout: float = 5.0,
        recycle: int = 240,
        connect_timeout: float = 12.0,
        hot_pool_size: int = 6,
    ) -> None:
        self.target = target
        args = {
            "timeout": connect_timeout,
            "command_timeout": COMMAND_TIMEOUT_S,
        } | target.connect_args
        args["connection_class"] = PoolerConnection if target.is_pooled else DriverConnection
        self.engine: AsyncEngine = create_async_engine(
            target.url,
            connect_args=args,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=pool_timeout,
            pool_recycle=recycle,
            # The least used connections age and are recycled, and a suspended database loses few.
            pool_use_lifo=True,
            hide_parameters=True,
        )
        _ping_after_idle(self.engine)
        # Outside a transaction a read costs one round trip instead of three. Behind a transaction pooler each statement of a
        # driver without prepared statements may meet another server unless BEGIN holds it (SQLAlchemy #12836).
        self._reader = (
            self.engine
            if target.is_pooled
            else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        # For a question to the database while calls that wait for locks hold the whole pool.
        self._apart = create_async_engine(
            target.url, connect_args=args, poolclass=NullPool, hide_parameters=True
        )
        self._limit = pool_size + max_overflow
        hot = max(1, min(hot_pool_size, pool_size, self._limit - MIN_OTHER_CONNECTIONS))
        self.hot_pool = HotPool(self.engine, hot)
        rest = max(1, self._limit - hot)
        self._permits, self._write_permits = FairSemaphore(rest), FairSemaphore(rest - rest // 3)
        self._pool_timeout = pool_timeout
        self._writes: set[asyncio.Task[Any]] = set()
        self._connections: weakref.WeakSet[asyncpg.Connection] = weakref.WeakSet()
        event.listen(
            self.engine.sync_engine,
            "connect",
            lambda made, _: self._connections.add(made.driver_connection),
        )
        self._loop = asyncio.get_running_loop()
        self.hot_pool.on_slow_statement = lambda: self.on_suspected_outage()  # noqa: PLW0108 - it is set later
        self.on_suspected_outage: Callable[[], None] = lambda: None
        """Called when a call has shown, or suggests, that the database does not answer."""

    async def fetch(self, statement: Statement, *args: Any, deadline: float) -> list[Record]:
        """Run one hot statement that only reads, and return its rows.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `failures` maps them.
        """
        try:
            return await self.fetch_once(statement, *args)
        except DATABASE_ERRORS as error:
            return await self._attempts(
                lambda _: self.fetch_once(statement, *args), deadline, error
            )

    async def fetch_once(self, statement: Statement, *args: Any) -> list[Record]:
        """Run one statement by the driver in a transaction of its own, without a retry.

        Raises:
            Whatever the driver raises; see `failures.classify`.
        """
        kept = await self.hot_pool.acquire()
        give_back = self.hot_pool.release
        try:
            if not self.target.is_pooled:
                return await kept.driver.fetch(statement.text, *args)
            return await fetch_in_transaction(kept.driver, statement, *args)
        except (TimeoutError, asyncpg.InternalClientError):
            # The driver's own limit: the server may be gone without a word, so nobody waits for this connection again. Or the server
            # has said that it ends this connection, and the end itself has not come yet.
            kept.driver.terminate()
            raise
        except asyncio.CancelledError:
            self._suspect(kept.since)
            give_back = self.hot_pool.release_abandoned
            raise
        finally:
            give_back(kept)

    async def read(
        self,
        work: Work[T],
        *,
        owner_id: str,
        deadline: float,
    ) -> T:
        """Run statements that change nothing.

        Args:
            work: May run several times, each time on a connection of its own.
            owner_id: The user in whose turn it waits for a connection: the caller's id, or NO_OWNER.
            deadline: A time of the running loop's clock, in seconds.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `failures` maps them.
        """

        async def once(give_up: float) -> T:
            async with (
                self._permits.hold(owner_id, self._patience(give_up)),
                self._reader.connect() as connection,
            ):
                return await work(connection)

        return await self._attempts(once, deadline)

    async def write(
        self,
        work: Work[T],
        *,
        owner_id: str,
        deadline: float,
    ) -> T:
        """Run a transaction and commit it; a caller that is cancelled meanwhile does not stop it.

        `work` may run several times, each time in a transaction of its own; also when the connection was lost during COMMIT, and nobody
        knows whether that one counts. If the next run is then refused, the refusal may be its own predecessor's doing, so the caller
        is told to find out.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `failures` maps them.
            ServiceError: what `work` raises.
        """
        unknown = False

        async def once(give_up: float) -> T:
            nonlocal unknown
            give_up -= LOCK_TIMEOUT_S
            async with (
                self._write_permits.hold(owner_id, self._patience(give_up)),
                self._permits.hold(owner_id, self._patience(give_up)),
                self.engine.connect() as connection,
            ):
                try:
                    result = await work(connection)
                except ServiceError as error:
                    if not unknown:
                        raise
                    raise Unavailable(
                        "the database went away before it said whether this was done; read and decide"
                    ) from error
                try:
                    await connection.commit()
                except DATABASE_ERRORS as error:
                    unknown = unknown or classify(error) is Failure.LOST
                    raise
                return result

        return await self.shield(self._attempts(once, deadline))

    async def shield(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry `work` to its end even when the caller is cancelled; `drain` waits for it."""
        task = self._loop.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._writes.discard(task)
        if not task.cancelled():
            task.exception()  # Seen, also when the caller who would have seen it is gone.

    async def drain(self) -> None:
        """Wait for writes whose callers may be gone."""
        while self._writes:
            await asyncio.wait(self._writes)

    async def _attempts(
        self,
        once: Callable[[float], Awaitable[T]],
        deadline: float,
        error: BaseException | None = None,
    ) -> T:
        """Try until it works, the error is final, or the time is up; `error` is what a first try has met already.

        `once` is given the time by which it must have what it waits for.
        """
        give_up = outage_deadline(deadline, self._loop.time())
        attempt = 0
        while True:
            if error is not None:
                await self._pause(error, attempt, give_up)
                attempt += 1
            started = self._loop.time()
            scope = asyncio.timeout_at(deadline)
            try:
                async with scope:
                    return await once(give_up)
            except DATABASE_ERRORS as failed:
                if scope.expired():
                    self._suspect(started)
                    raise DeadlineExceeded("the database did not answer in time") from None
                if error is None or not isinstance(failed, AcquireTimeout):
                    error = failed  # Else what it has met before says more.
            except asyncio.CancelledError:
                self._suspect(started)
                raise

    def _patience(self, give_up: float) -> float:
        """Return how many seconds a call may wait for a connection."""
        return min(self._pool_timeout, give_up - self._loop.time())

    async def _pause(self, error: BaseException, attempt: int, give_up: float) -> None:
        """Wait before the next try, or raise what the caller is told when there is none."""
        failure = classify(error)
        if failure in (Failure.LOST, Failure.REFUSED):
            self.on_suspected_outage()
        pause = backoff(attempt)
        if failure is Failure.LOCKED:
            give_up -= LOCK_TIMEOUT_S  # The next wait may be in vain too.
        if self._may_retry(failure, attempt) and self._loop.time() + pause < give_up:
            await asyncio.sleep(pause)
            return
        known = to_service_error(error)
        if known is None:
            raise error
        raise known from None

    @staticmethod
    def _may_retry(failure: Failure, attempt: int) -> bool:
        match failure:
            case Failure.CONTENTION:
                return attempt + 1 < MAX_ATTEMPTS
            case Failure.LOCKED | Failure.LOST | Failure.REFUSED:
                return True
            case _:
                return False

    def _suspect(self, started: float) -> None:
        """Cast doubt on the database when a call was given up that had waited for it a while."""
        if self._loop.time() - started > SUSPICIOUS_WAIT_S:
            self.on_suspected_outage()

    async def probe(self, timeout: float) -> SchemaVersion:
        """Ask the database for its schema's version, on a connection of its own when the pool has none left; one try.

        Raises:
            Whatever connecting or the statement raises, and TimeoutError.
        """
        full = self.engine.pool.checkedout() >= self._limit  # type: ignore[attr-defined]
        async with (
            asyncio.timeout(timeout),
            (self._apart if full else self._reader).connect() as connection,
        ):
            return await schema_version(connection)

    def terminate(self) -> None:
        """Cut every connection, as to a database that does not answer."""
        for connection in list(self._connections):
            connection.terminate()

    async def close(self, patience: float | None = None) -> None:
        """Wait for writes, those that take longer than `patience` seconds are given up, and close every connection."""
        if self._writes:
            _, left = await asyncio.wait(self._writes, timeout=patience)
            if left:
                self.terminate()
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=CLOSE_TIMEOUT_S)
        closing = self._loop.create_task(self._close())
        _, late = await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if late:
            # A database that has gone silent says no goodbye.
            self.terminate()
            await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if closing.done():
            closing.result()

    async def _close(self) -> None:
        await self.hot_pool.close()
        await self.engine.dispose()


def _ping_after_idle(engine: AsyncEngine) -> None:
    """Try connections that idled long before they are used; a ping at every checkout would cost up to four round trips."""

    def checked_in(_connection: object, entry: ConnectionPoolEntry) -> None:
        entry.info["idle_since"] = time.monotonic()

    def checked_out(
        connection: Any, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection
    ) -> None:
        idle_since = entry.info.get("idle_since")
        if idle_since is not None and time.monotonic() - idle_since > PING_AFTER_IDLE_S:
            try:
                engine.sync_engine.dialect.do_ping(connection)
            except Exception as error:
                raise DisconnectionError("the connection went away while idle") from error

    event.listen(engine.sync_engine, "checkin", checked_in)
    event.listen(engine.sync_engine, "checkout", checked_out)
