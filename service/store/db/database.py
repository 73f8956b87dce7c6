"""Runs statements and transactions: connections, fairness, retries, and suspicion of an outage.

There are four entry points:

- `fetch`: one hot statement that only reads, run by the driver itself;
- `fetch_once`: one statement run by the driver, without retries;
- `read`: SQLAlchemy statements that change nothing;
- `write`: a transaction, which is retried as a whole and runs to its end when its caller is
  cancelled.

A deadline is a time of the running loop's clock (`loop.time()`), in seconds. An attempt in flight
is cancelled then, and retries end shortly before, so that the error still reaches the client.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import DeadlineExceeded, ServiceError, Unavailable
from service.store.db.connector import Connector
from service.store.db.db_errors import (
    READ_ONLY,
    classify,
    may_have_committed,
    rule,
    sqlstate,
    to_service_error,
)
from service.store.db.dsn import Target
from service.store.db.engine import pooled_engine, unpooled_engine
from service.store.db.error_log import ErrorLog
from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore
from service.store.db.hot_pool import (
    LOCK_TIMEOUT_S,
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
from service.store.db.sqlstates import Failure, Policy
from service.store.db.work_class import (
    MAX_WAIT_S,
    STATEMENT_TIMEOUT_S,
    ExpensiveWork,
    WorkClass,
    overloaded_error,
)
from service.store.schema.location import SchemaLocator

T = TypeVar("T")

Work = Callable[[AsyncConnection], Awaitable[T]]
"""Statements to run on one connection; called once for each attempt."""

NO_OWNER = "no owner"
"""Owner id for work that concerns no single user, such as listing users: a queue of its own."""

SUSPICIOUS_WAIT_S = 0.5
"""Seconds that a call has waited for the database for its cancellation to suggest an outage."""
SUSPICIOUS_WAITS_S = {
    WorkClass.ORDINARY: SUSPICIOUS_WAIT_S,
    # Expensive work may take that long although the database is well.
    WorkClass.EXPENSIVE: MAX_WAIT_S + STATEMENT_TIMEOUT_S,
}
"""The same for `read` and `write`, by the class of their work."""
MAX_ATTEMPTS = 6
"""Attempts of a transaction that is rolled back by contention."""
MAX_CANCELLED_ATTEMPTS = 3
"""Attempts of a statement that the server cancels."""
OUTAGE_TIMEOUT_S = 15.0
"""Seconds that a call waits for an unavailable database, at most."""
REPLY_MARGIN_S = 0.25
"""Seconds before its deadline at which a waiting call fails, so that the reply still arrives."""
CLOSE_TIMEOUT_S = 1.0
"""Seconds in which connections may close gracefully."""
GENERATION_INTERVAL_S = 1.0
"""Minimum seconds between two replacements of all connections that failed statements cause."""
MIN_OTHER_CONNECTIONS = 2
"""Connections of a small pool that the hot statements leave for everything else."""

DATABASE_ERRORS = (
    DBAPIError,
    PoolTimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""The errors of the driver, SQLAlchemy and the socket when a statement or a connection fails."""


def backoff(attempt: int, *, base_s: float = 0.02, cap_s: float = 1.0) -> float:
    """Return the seconds to wait before the next attempt: full jitter, so that retries spread."""
    return random.uniform(0, min(cap_s, base_s * 2**attempt))  # noqa: S311 - not a secret


def reply_margin_s(deadline: float, now: float) -> float:
    """Return the seconds before its deadline at which a call stops waiting."""
    return min(REPLY_MARGIN_S, (deadline - now) / 4)


def outage_deadline(deadline: float, now: float) -> float:
    """Return when a call stops waiting for an unavailable database, on the event loop's clock."""
    return min(deadline - reply_margin_s(deadline, now), now + OUTAGE_TIMEOUT_S)


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
        connector, self._generation = Connector(target), Generation()
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
        # one server (SQLAlchemy #12836).
        self._read_engine = (
            self.engine
            if target.is_pooled
            else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        # For probes, while calls that wait for locks hold every connection of the pool.
        self._probe_engine = unpooled_engine(target, connector, connect_timeout_s=connect_timeout_s)
        self.locator.attach(self._probe_engine)
        max_connections = pool_size + max_overflow
        max_hot_size = max_connections - MIN_OTHER_CONNECTIONS
        hot_size = max(1, min(hot_pool_size, pool_size, max_hot_size))
        self.hot_pool = HotPool(self.engine, hot_size, self._generation)
        self.outcomes = Outcomes()
        self.prober = Prober(
            self.outcomes,
            pooled=self._read_engine,
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
        self.rejected_count = 0
        """Calls that found no connection in time, because others used them all."""
        self._pool_timeout_s = pool_timeout_s
        self._writes: set[asyncio.Task[Any]] = set()
        self.on_suspected_outage: Callable[[], None] = lambda: None
        """Called when a call has shown, or suggests, that the database is unavailable."""
        self._error_log = ErrorLog()
        # Looked up at each call, since the attribute is assigned later.
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
            return await self.fetch_once(statement, *args)
        except DATABASE_ERRORS as error:
            return await self._retry(lambda _: self.fetch_once(statement, *args), deadline, error)

    async def fetch_once(self, statement: Statement, *args: Any) -> list[Record]:
        """Run one statement by the driver in a transaction of its own, without retries.

        Raises:
            Any error of the driver; see `db_errors.classify`.
        """
        connection = await self.hot_pool.acquire()
        release = self.hot_pool.release
        try:
            # After a connection was opened, which finds the schema.
            statement = self.locator.statements[statement]
            driver = connection.driver
            if self.target.is_pooled:
                records = await fetch_in_transaction(driver, statement, *args)
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
            self._suspect_outage(connection.used_at)
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
        if sqlstate(error) != READ_ONLY:
            return True
        if self.prober.is_read_only:
            return False  # Connections that can read stay open.
        now = self._loop.time()
        # Limited, since the replacements are read-only, too, until the database is writable again.
        if now - self._generation_started_at >= GENERATION_INTERVAL_S:
            self._generation_started_at = now
            self.start_generation()
        return True

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
        engine = self.engine if is_expensive else self._read_engine

        async def attempt(wait_until: float) -> T:
            async with (
                self.expensive_work.permit(work_class, owner_id, wait_until),
                self._permits.hold(owner_id, self._acquire_timeout_s(wait_until)),
                engine.connect() as connection,
                self.expensive_work.limits(work_class, connection, wait_until),
            ):
                result = await self._run_work(work, connection)
                self.outcomes.reads.successes += 1
                return result

        return await self._retry(
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

        retries = self._retry(
            attempt,
            deadline,
            suspicious_wait_s=SUSPICIOUS_WAITS_S[work_class],
            is_write=True,
        )
        return await self.shield(retries, lambda: has_begun)

    async def shield(
        self, work: Coroutine[Any, Any, T], has_begun: Callable[[], bool] = lambda: True
    ) -> T:
        """Run `work` to its end even when the caller is cancelled; `drain` waits for it.

        Args:
            work: The work.
            has_begun: Whether the work may have changed anything; if not, it is cancelled with its
                caller, so that abandoned calls do not queue for connections.
        """
        task = self._loop.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._on_write_done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not has_begun():
                task.cancel()
            raise

    def _on_write_done(self, task: asyncio.Task[Any]) -> None:
        self._writes.discard(task)
        if not task.cancelled():
            # Marks the exception as retrieved: the caller may have been cancelled.
            task.exception()

    async def drain(self) -> None:
        """Wait for the writes in flight, including those of cancelled callers."""
        while self._writes:
            await asyncio.wait(self._writes)

    async def _retry(
        self,
        attempt: Callable[[float], Awaitable[T]],
        deadline: float,
        error: BaseException | None = None,
        suspicious_wait_s: float = SUSPICIOUS_WAIT_S,
        *,
        is_write: bool = False,
    ) -> T:
        """Repeat attempts until one succeeds, an error is final, or the time is up.

        Args:
            attempt: Is passed the time until which it may wait for a connection.
            deadline: The call's deadline.
            error: The error of a first attempt by the caller, if there was one.
            suspicious_wait_s: Seconds after which the end of the caller's time suggests an outage.
            is_write: Whether the attempts are evidence about writes, and not about reads.
        """
        now = self._loop.time()
        wait_until = outage_deadline(deadline, now)
        # An attempt in flight at `wait_until` may still end with an error that says more.
        end_at = deadline - reply_margin_s(deadline, now) / 2
        attempts = 0
        while True:
            if error is not None:
                await self._back_off(error, attempts, wait_until, is_write=is_write)
                attempts += 1
            started_at = self._loop.time()
            scope = asyncio.timeout_at(end_at)
            try:
                async with scope:
                    return await attempt(wait_until)
            except DATABASE_ERRORS as attempt_error:
                if scope.expired():
                    self._suspect_outage(started_at, suspicious_wait_s)
                    raise DeadlineExceeded("the database did not respond in time") from None
                if not isinstance(attempt_error, AcquireTimeout):
                    error = attempt_error
                elif error is None:  # An earlier error says more about the cause.
                    if attempt_error.is_busy:
                        self.rejected_count += 1
                        raise overloaded_error() from None
                    error = attempt_error
            except asyncio.CancelledError:
                self._suspect_outage(started_at, suspicious_wait_s)
                raise

    def _acquire_timeout_s(self, wait_until: float) -> float:
        return min(self._pool_timeout_s, wait_until - self._loop.time())

    async def _back_off(
        self, error: BaseException, attempts: int, wait_until: float, *, is_write: bool
    ) -> None:
        """Wait before the next attempt, or raise the caller's error when there is none."""
        failure = classify(error)
        pause = backoff(attempts)
        if failure is Failure.LOCKED:
            wait_until -= LOCK_TIMEOUT_S  # The next attempt may time out on the lock, too.
        may_retry = self._may_retry(failure, attempts) and self._loop.time() + pause < wait_until
        self.report(error, is_write=is_write, failed_calls=0 if may_retry else 1)
        if may_retry:
            await asyncio.sleep(pause)
            return
        service_error = to_service_error(error)
        if service_error is None:
            raise error
        raise service_error from None

    @staticmethod
    def _may_retry(failure: Failure, attempts: int) -> bool:
        match failure:
            case Failure.CONTENTION:
                return attempts + 1 < MAX_ATTEMPTS
            case Failure.CANCELLED:
                return attempts + 1 < MAX_CANCELLED_ATTEMPTS
            case Failure.LOCKED | Failure.LOST | Failure.OUTAGE:
                return True
            case _:
                return False

    def report(
        self, error: BaseException, *, is_write: bool = False, failed_calls: int = 0
    ) -> None:
        """Take a database error as evidence against the database, and log its cause.

        Args:
            error: The error.
            is_write: Whether the work was a write.
            failed_calls: Number of calls that fail with it; 0 if the work is repeated.
        """
        self._error_log.add(error)
        if self.outcomes.report(error, is_write=is_write, failed_calls=failed_calls):
            self.on_suspected_outage()

    def _suspect_outage(self, started_at: float, wait_s: float = SUSPICIOUS_WAIT_S) -> None:
        """Report a suspected outage if an unsuccessful call has waited for long enough."""
        if self._loop.time() - started_at > wait_s:
            self.on_suspected_outage()

    def terminate(self) -> None:
        """Close every connection without waiting for a response."""
        for connection in list(self._connections):
            connection.terminate()

    async def close(self, timeout_s: float | None = None) -> None:
        """Wait up to `timeout_s` seconds for the writes in flight, then close every connection."""
        if self._writes:
            _, unfinished = await asyncio.wait(self._writes, timeout=timeout_s)
            if unfinished:
                self.terminate()
                for task in unfinished:
                    task.cancel()
                await asyncio.wait(unfinished, timeout=CLOSE_TIMEOUT_S)
        closing = self._loop.create_task(self._close())
        _, unfinished = await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if unfinished:
            # An unresponsive server does not answer the request to close.
            self.terminate()
            await asyncio.wait((closing,), timeout=CLOSE_TIMEOUT_S)
        if closing.done():
            closing.result()

    async def _close(self) -> None:
        await self.hot_pool.close()
        await self.engine.dispose()
