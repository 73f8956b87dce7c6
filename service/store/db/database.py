"""Runs statements and transactions: connections, fairness, and retries as a whole.

There are four entry points:

- `fetch`: one hot statement that only reads, run by the driver itself;
- `fetch_once`: one statement run by the driver, without retries;
- `read`: SQLAlchemy statements that change nothing;
- `write`: a transaction, which is retried as a whole and runs to its end when its caller is
  cancelled.

A deadline is a time of the running loop's clock (`loop.time()`), in seconds. `retries` says what
happens when an attempt fails.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import ServiceError, Unavailable
from service.store.db.connector import Connector
from service.store.db.db_errors import (
    DATABASE_ERRORS,
    READ_ONLY,
    may_have_committed,
    rule,
    sqlstate,
)
from service.store.db.driver_connection import LOCK_TIMEOUT_S
from service.store.db.dsn import Route, Target
from service.store.db.engine import pooled_engine, unpooled_engine
from service.store.db.fair_semaphore import FairSemaphore
from service.store.db.hot_pool import (
    Generation,
    HotPool,
    Record,
    Statement,
    fetch_in_transaction,
)
from service.store.db.outcomes import Outcomes
from service.store.db.proofs import Prober
from service.store.db.recent_keys import RecentKeys
from service.store.db.replication import check_replicated, confirm_replication
from service.store.db.retries import SUSPICIOUS_WAIT_S, Retries
from service.store.db.sqlstates import Policy
from service.store.db.work_class import (
    MAX_WAIT_S,
    STATEMENT_TIMEOUT_S,
    ExpensiveWork,
    WorkClass,
)
from service.store.db.writes_in_flight import WritesInFlight
from service.store.schema.location import SchemaLocator

T = TypeVar("T")

Work = Callable[[AsyncConnection], Awaitable[T]]
"""Statements to run on one connection; called once for each attempt."""

NO_OWNER = "no owner"
"""Owner id for work that concerns no single user, such as listing users: a queue of its own."""

CLOSE_TIMEOUT_S = 1.0
"""Seconds in which connections may close gracefully."""
GENERATION_INTERVAL_S = 1.0
"""Minimum seconds between two replacements of all connections that failed statements cause."""
MIN_OTHER_CONNECTIONS = 2
"""Connections of a small pool that the hot statements leave for everything else."""
_MISSING_STATEMENT = ("26000", "42P05")
"""SQLSTATEs of a prepared statement that is missing, or exists already: the sign of a pooler."""
SUSPICIOUS_WAITS_S = {
    WorkClass.ORDINARY: SUSPICIOUS_WAIT_S,
    # Expensive work may take that long although the database is well.
    WorkClass.EXPENSIVE: MAX_WAIT_S + STATEMENT_TIMEOUT_S,
}
"""`SUSPICIOUS_WAIT_S` of `read` and `write`, by the class of their work."""


class Database:
    """One PostgreSQL database, reached through one pool of connections.

    The pool is divided so that one kind of call cannot starve another. The hot statements have
    connections of their own (`hot_pool`). The rest is granted to users in rotation, and
    transactions, which may wait for locks, hold at most two thirds of it.
    Expensive work holds at most a third (`work_class`).
    """

    def __init__(
        self,
        target: Target,
        *,
        pool_size: int = 8,
        max_overflow: int = 4,
        pool_timeout_s: float = 5.0,
        recycle_s: int = 240,
        connect_timeout_s: float = 12.0,
        hot_pool_size: int = 6,
    ) -> None:
        """Create the engine; it connects when it is first used.

        Args:
            target: Where the database is.
            pool_size: Connections that are kept open.
            max_overflow: Further connections that may be opened and are closed after use.
            pool_timeout_s: Seconds that a call waits for a connection.
            recycle_s: Age of a connection in seconds after which it is replaced.
            connect_timeout_s: Seconds that connecting may take; the URL's own value has precedence.
            hot_pool_size: Connections for the hot statements; fewer if the pool is small.
        """
        self._loop = asyncio.get_running_loop()
        self.target = target
        connector = self.connector = Connector(target)
        connector.on_route = self._use_route
        self.is_pooled = target.route in (None, Route.TRANSACTION)
        """Whether each statement must be in a transaction; true until the route is found."""
        self._generation = Generation()
        self._generation_started_at = -GENERATION_INTERVAL_S
        self.engine = pooled_engine(
            target,
            connector,
            self._generation,
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout_s=pool_timeout_s,
            recycle_s=recycle_s,
            connect_timeout_s=connect_timeout_s,
        )
        self._connections: weakref.WeakSet[asyncpg.Connection] = weakref.WeakSet()
        event.listen(
            self.engine.sync_engine,
            "connect",
            lambda connection, _: self._connections.add(connection.driver_connection),
        )
        self.locator = SchemaLocator(target.schema)
        self.locator.attach(self.engine)
        # Outside a transaction a read costs one round trip instead of three. Behind a transaction
        # pooler, BEGIN is needed to keep the statements of a driver without prepared statements on
        # one server (SQLAlchemy #12836). On a replica, the age of its data holds for one server.
        self._autocommit_engine = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        # For probes, while calls that wait for locks hold every connection of the pool.
        self._probe_engine = unpooled_engine(target, connector, connect_timeout_s=connect_timeout_s)
        self.locator.attach(self._probe_engine)
        max_connections = pool_size + max_overflow
        max_hot_size = max_connections - MIN_OTHER_CONNECTIONS
        hot_size = max(1, min(hot_pool_size, pool_size, max_hot_size))
        self.hot_pool = HotPool(self.engine, hot_size, self._generation)
        self.outcomes = Outcomes()
        self.on_suspected_outage: Callable[[], None] = lambda: None
        """Called when a call has shown, or suggests, that the database is unavailable."""
        # Looked up at each call, since the attribute is assigned later.
        self.retries = Retries(self.outcomes, lambda: self.on_suspected_outage())  # noqa: PLW0108
        self.retries.on_wrong_role = self._replace_stale
        self.writes_in_flight = WritesInFlight()
        self.prober = Prober(
            self.outcomes,
            pooled=self.engine,
            unpooled=self._probe_engine,
            max_connections=max_connections,
        )
        self.prober.on_writable = self.start_generation
        self.prober.release_connections = self.hot_pool.return_idle
        permit_count = max(1, max_connections - hot_size)
        self._permits = FairSemaphore(permit_count)
        self._write_permits = FairSemaphore(permit_count - permit_count // 3)
        self.expensive_work = ExpensiveWork(permit_count)
        self.large_reads = RecentKeys()
        """Users with large hot reads, and contexts and lists that were large when they were read
        last. The next such read is sent apart from others from the start."""
        self._pool_timeout_s = pool_timeout_s
        self.hot_pool.on_slow_statement = lambda: self.on_suspected_outage()  # noqa: PLW0108

    @property
    def waiting_count(self) -> int:
        """Number of calls that wait for a connection, without those of the hot statements."""
        return self._permits.waiting_count + self._write_permits.waiting_count

    async def fetch(self, statement: Statement, *args: Any, deadline: float) -> list[Record]:
        """Run one hot statement that only reads, and return its rows.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `db_errors` maps them.
        """
        try:
            return await self.fetch_once(statement, *args, is_reading=True)
        except DATABASE_ERRORS as error:
            return await self.retries.run(
                lambda _: self.fetch_once(statement, *args, is_reading=True), deadline, error
            )

    async def fetch_once(
        self, statement: Statement, *args: Any, is_reading: bool = False
    ) -> list[Record]:
        """Run one statement by the driver in a transaction of its own, without retries.

        Args:
            statement: The statement.
            args: Its arguments.
            is_reading: Whether it only reads, and a standby behind a pooler must reject it.

        Raises:
            Any error of the driver; see `db_errors.classify`.
        """
        connection = await self.hot_pool.acquire()
        release = self.hot_pool.release
        try:
            # After a connection was opened, which finds the schema.
            statement = self.locator.statements[statement]
            driver = connection.driver
            if self.is_pooled:
                driver.is_reading = is_reading
                try:
                    records = await fetch_in_transaction(driver, statement, *args)
                finally:
                    driver.is_reading = False
            else:
                records = await driver.fetch(statement.text, *args)
            if driver.is_unreplicated:
                driver.check_replicated()
            self.outcomes.reads.successes += 1
            return records
        except asyncpg.PostgresError as error:
            if self._is_unusable(error):
                connection.driver.terminate()
            raise
        except (TimeoutError, asyncpg.InternalClientError):
            # Either the driver's own timeout has passed, and the server may have disappeared
            # without closing the connection; or the server has announced that it closes the
            # connection, and has not done so yet. In both cases no later call may wait for this
            # connection.
            connection.driver.terminate()
            raise
        except asyncio.CancelledError:
            self.retries.suspect_outage(connection.used_at)
            release = self.hot_pool.release_abandoned
            raise
        finally:
            release(connection)

    def _is_unusable(self, error: BaseException) -> bool:
        """Return whether a failed statement's connection must be closed.

        A read-only session also suggests that all connections are to a server of another role.
        """
        if rule(error).policy is not Policy.RECONNECT:
            return False
        state = sqlstate(error)
        if state in _MISSING_STATEMENT and self.connector.note_missing_statement():
            self.is_pooled = True
            self.start_generation()
        if state != READ_ONLY:
            return True
        self._replace_stale()
        return not self.prober.is_read_only  # Connections that can read stay open.

    def _replace_stale(self) -> None:
        """Replace all connections, since a server had the wrong role."""
        if self.prober.is_read_only:
            return  # The prober replaces them when a server is writable.
        now = self._loop.time()
        # Limited, since the replacements are read-only, too, until the database is writable again.
        if now - self._generation_started_at >= GENERATION_INTERVAL_S:
            self._generation_started_at = now
            self.start_generation()

    def _use_route(self, target: Target) -> None:
        self.is_pooled = target.is_pooled

    @asynccontextmanager
    async def _reading(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Let a standby behind a pooler reject the transactions of a block, which only reads."""
        if not self.is_pooled or self.target.is_replica:
            yield
            return
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.is_reading = True
        try:
            yield
        finally:
            driver.is_reading = False

    def start_generation(self) -> None:
        """Replace all connections: the idle ones now, the others when they are returned."""
        self._generation.number += 1
        self.hot_pool.return_idle()

    async def _run_work(self, work: Work[T], connection: AsyncConnection) -> T:
        """Run an attempt's statements on a connection, and close it if they show it unusable."""
        try:
            return await work(connection)
        except DATABASE_ERRORS as error:
            if self._is_unusable(error):
                await connection.invalidate()
            raise

    async def read(
        self,
        work: Work[T],
        *,
        owner_id: str,
        deadline: float,
        work_class: WorkClass = WorkClass.ORDINARY,
    ) -> T:
        """Run statements that change nothing.

        Args:
            work: Called once for each attempt, each time with a connection. If it is expensive, the
                connection is in a transaction.
            owner_id: The user in whose turn the call waits: the caller, or NO_OWNER.
            deadline: A time of the running loop's clock, in seconds.
            work_class: Whose permits the work uses, and which limits its statements have.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `db_errors` maps them.
            Overloaded: too much expensive work waits.
            ServiceError: raised by `work`.
        """
        # The limits of expensive work hold for a transaction.
        is_expensive = work_class is WorkClass.EXPENSIVE

        async def attempt(wait_until: float) -> T:
            is_transaction = is_expensive or self.is_pooled or self.target.is_replica
            engine = self.engine if is_transaction else self._autocommit_engine
            async with (
                self.expensive_work.permit(work_class, owner_id, wait_until),
                self._permits.hold(owner_id, self._acquire_timeout_s(wait_until)),
                engine.connect() as connection,
                self._reading(connection),
                self.expensive_work.limits(work_class, connection, wait_until),
            ):
                result = await self._run_work(work, connection)
                self.outcomes.reads.successes += 1
                return result

        return await self.retries.run(
            attempt, deadline, suspicious_wait_s=SUSPICIOUS_WAITS_S[work_class]
        )

    async def write(
        self,
        work: Work[T],
        *,
        owner_id: str,
        deadline: float,
        work_class: WorkClass = WorkClass.ORDINARY,
    ) -> T:
        """Run a transaction and commit it, also when the caller is cancelled after its begin.

        `work` may run several times, each time in a new transaction. One case is a connection that
        is lost during COMMIT, which leaves unknown whether the transaction was committed. If the
        next attempt is then refused, the first one may be the cause, so the caller is asked to find
        out.

        Args:
            work: Called once for each attempt, each time with a connection in a transaction.
            owner_id: The user in whose turn the call waits: the caller, or NO_OWNER.
            deadline: A time of the running loop's clock, in seconds.
            work_class: Whose permits the work uses, and which limits its statements have.

        Raises:
            Unavailable, Conflict, DeadlineExceeded: as `db_errors` maps them.
            Overloaded: too much expensive work waits.
            ServiceError: raised by `work`.
        """
        is_outcome_unknown = has_begun = False

        async def attempt(wait_until: float) -> T:
            nonlocal is_outcome_unknown, has_begun
            wait_until -= LOCK_TIMEOUT_S
            async with (
                self.expensive_work.permit(work_class, owner_id, wait_until),
                self._write_permits.hold(owner_id, self._acquire_timeout_s(wait_until)),
                self._permits.hold(owner_id, self._acquire_timeout_s(wait_until)),
                self.engine.connect() as connection,
                self.expensive_work.limits(work_class, connection, wait_until),
            ):
                has_begun = True
                try:
                    result = await self._run_work(work, connection)
                    if is_outcome_unknown:
                        # It may have found what an earlier attempt has stored.
                        await confirm_replication(connection)
                except ServiceError as error:
                    if not is_outcome_unknown:
                        raise
                    raise Unavailable(
                        "the connection was lost during COMMIT; read whether the change is stored"
                    ) from error
                try:
                    await connection.commit()
                    check_replicated(connection)
                except DATABASE_ERRORS as error:
                    is_outcome_unknown |= may_have_committed(error)
                    raise
                self.outcomes.writes.successes += 1
                return result

        retries = self.retries.run(
            attempt,
            deadline,
            suspicious_wait_s=SUSPICIOUS_WAITS_S[work_class],
            is_write=True,
        )
        return await self.writes_in_flight.run(retries, lambda: has_begun)

    def _acquire_timeout_s(self, wait_until: float) -> float:
        return min(self._pool_timeout_s, wait_until - self._loop.time())

    def terminate(self) -> None:
        """Close every connection without waiting for a response."""
        for connection in list(self._connections):
            connection.terminate()

    async def close(self, timeout_s: float | None = None) -> None:
        """Wait up to `timeout_s` seconds for the writes in flight, then close every connection."""
        await self.writes_in_flight.close(timeout_s, self.terminate)
        closing = self._loop.create_task(self._close())
        _, unfinished = await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if unfinished:
            # An unresponsive server does not answer the request to close.
            self.terminate()
            await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if closing.done():
            closing.result()

    async def _close(self) -> None:
        await self.connector.close()
        await self.hot_pool.close()
        await self.engine.dispose()
