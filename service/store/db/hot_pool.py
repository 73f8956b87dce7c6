"""The driver's connections: what they do otherwise than asyncpg's, and those that are kept for the hot statements alone.

SQLAlchemy compiles the hot statements and owns the pool; the compiled text is run by the asyncpg connection under it, on
connections that stay checked out while traffic flows. That saves the greenlet, the result wrapping and the reset at every release,
which together cost more than the statement itself (docs/explanation/performance.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import asyncpg
from sqlalchemy import ClauseElement
from sqlalchemy.dialects.postgresql import asyncpg as dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

MAX_IDLE_S = 2.0
"""How long an unused connection is kept before it goes back to the pool."""

SYNC_TIMEOUT_S = 2.0
"""In which a connection must answer that a caller has left, or it is cut."""

SLOW_STATEMENT_S = 2.0
"""After which an unanswered statement casts doubt on the database."""

LOCK_TIMEOUT_S = 0.2
"""Seconds that a transaction waits for a lock of somebody else's before it gives its connection back and tries again."""

Record = asyncpg.Record
_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call]


class Statement:
    """A statement compiled once to the driver's own text, with its parameters in order."""

    __slots__ = ("names", "text")

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        self.text: str = str(compiled)
        self.names: tuple[str, ...] = tuple(getattr(compiled, "positiontup", None) or ())

    @classmethod
    def from_text(cls, text: str) -> Statement:
        """Take a text that is numbered ($1, $2, …) already."""
        self = cls.__new__(cls)
        self.text, self.names = text, ()
        return self

    def bind(self, **values: Any) -> tuple[Any, ...]:
        """Put named values in the order of the text."""
        return tuple(values[name] for name in self.names)


class DriverConnection(asyncpg.Connection):
    """Begins its transactions with a bound on their waits for locks, in the same round trip.

    A transaction pooler refuses that bound as a start-up parameter, and a statement of its own would cost each write a round trip.
    """

    __slots__ = ()

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        if query.startswith("BEGIN"):
            query += f" SET LOCAL lock_timeout = {LOCK_TIMEOUT_S * 1000:.0f};"
        return await super().execute(query, *args, timeout=timeout)


class PoolerConnection(DriverConnection):
    """A connection to a transaction pooler: a statement that nobody waits for any more is left by ending the connection.

    asyncpg would send a request to cancel on a connection of its own, and PgBouncer 1.18 ends itself when such a client goes away too
    early (github.com/pgbouncer/pgbouncer/issues/801), with the connections of everybody else.
    """

    __slots__ = ()

    async def _cancel(
        self, waiter: asyncio.Future[None], cancel_waiter: asyncio.Future[None] | None = None
    ) -> None:
        self.terminate()
        for each in (waiter, cancel_waiter):
            if each is not None and not each.done():
                each.set_result(None)


async def fetch_in_transaction(
    driver: asyncpg.Connection, statement: Statement, *args: Any
) -> list[Record]:
    """Run a statement between BEGIN and COMMIT, and leave no transaction open on the connection, whatever happens.

    Not by asyncpg's own block: when a caller goes away during its BEGIN, asyncpg takes the next block on the connection for a part of
    that one, so that it ends in RELEASE SAVEPOINT where COMMIT should be, and what it has stored is lost.

    Raises:
        Whatever the driver raises; a connection whose state is not known is cut.
    """
    try:
        await driver.execute("BEGIN;")
        rows = await driver.fetch(statement.text, *args)
        await driver.execute("COMMIT")
    except asyncpg.PostgresError:
        # The statement has failed, and the connection is sound unless it was ended.
        if not driver.is_closed() and driver.is_in_transaction():
            try:
                await driver.execute("ROLLBACK")
            except BaseException:
                driver.terminate()
                raise
        raise
    except BaseException:
        # Nobody waits for the answer: a network that has gone silent would hold up a caller who has gone away.
        driver.terminate()
        raise
    return rows


class HotConnection:
    """One connection that is checked out of SQLAlchemy's pool."""

    __slots__ = ("driver", "owner", "since")

    def __init__(self, owner: AsyncConnection, driver: asyncpg.Connection) -> None:
        self.owner = owner
        self.driver = driver
        self.since = 0.0
        """When it was last taken or given back, on the loop's clock."""


class HotPool:
    """At most `size` connections, newest used first; callers beyond that wait their turn."""

    def __init__(self, engine: AsyncEngine, size: int) -> None:
        self._engine = engine
        self._size = size
        # Kept, as asking for it costs a system call each time before Python 3.12.
        self._loop = asyncio.get_running_loop()
        self._idle: list[HotConnection] = []
        self._busy: set[HotConnection] = set()
        self._opening = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self.on_slow_statement: Callable[[], None] = lambda: None
        """Called while a statement has been under way for more than SLOW_STATEMENT_S."""

    async def acquire(self) -> HotConnection:
        """Take a connection, opening one when none is idle and the limit allows.

        Raises:
            Whatever connecting raises; see `failures.classify`.
        """
        while True:
            while self._idle:
                kept = self._idle.pop()
                if not kept.driver.is_closed():
                    kept.since = self._loop.time()
                    self._busy.add(kept)
                    return kept
                self._discard(kept)
            if len(self._busy) + self._opening < self._size:
                return await self._open()
            turn = self._loop.create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()  # The turn was ours already: pass it on.
                raise

    def release(self, kept: HotConnection) -> None:
        """Give a connection back, whatever has become of it."""
        self._busy.discard(kept)
        if kept.driver.is_closed() or self._closed:
            self._discard(kept)
        else:
            kept.since = self._loop.time()
            self._idle.append(kept)
        if self._waiting:
            self._wake()

    def release_abandoned(self, kept: HotConnection) -> None:
        """Give a connection back that a caller has left in the middle, once the server has ended what was begun.

        asyncpg only prepares a statement at first, and sends no Sync until it runs. Left in between, the server would keep the locks, and
        hold up a migration, until the connection's next use.
        """
        if kept.driver.is_closed():
            self.release(kept)
            return
        task = self._loop.create_task(self._settle(kept))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _settle(self, kept: HotConnection) -> None:
        try:
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                await kept.driver.execute("")
        except Exception:  # noqa: BLE001 - whatever it is, nobody shall wait for this connection
            kept.driver.terminate()
        finally:
            self.release(kept)

    def terminate(self) -> None:
        """Cut every connection, also those in use: what waits on them fails now instead of at its time-out."""
        for kept in (*self._idle, *self._busy):
            kept.driver.terminate()
        idle, self._idle = self._idle, []
        for kept in idle:
            self._discard(kept)

    async def close(self) -> None:
        """Give every idle connection back to the pool and keep none from now on."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for kept in self._idle:
            self._discard(kept)
        self._idle.clear()
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    async def _open(self) -> HotConnection:
        self._opening += 1
        try:
            owner = await self._engine.connect()
            try:
                raw = await owner.get_raw_connection()
                driver = raw.driver_connection
                assert driver is not None  # noqa: S101 - a fresh checkout has one
            except BaseException:
                await owner.close()
                raise
        except BaseException:
            self._opening -= 1
            self._wake()
            raise
        self._opening -= 1
        kept = HotConnection(owner, driver)
        kept.since = self._loop.time()
        self._busy.add(kept)
        if self._timer is None:
            self._timer = self._loop.call_later(SLOW_STATEMENT_S / 2, self._tick)
        return kept

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _tick(self) -> None:
        """Give back what nobody needs, and notice a statement that is not answered; only while connections are kept."""
        now = self._loop.time()
        stale = [kept for kept in self._idle if now - kept.since >= MAX_IDLE_S]
        self._idle = [kept for kept in self._idle if now - kept.since < MAX_IDLE_S]
        for kept in stale:
            self._discard(kept)
        if any(now - kept.since > SLOW_STATEMENT_S for kept in self._busy):
            self.on_slow_statement()
        again = bool(self._idle or self._busy)
        self._timer = self._loop.call_later(SLOW_STATEMENT_S / 2, self._tick) if again else None

    def _discard(self, kept: HotConnection) -> None:
        """Hand a connection back to SQLAlchemy's pool, or have the pool forget it when it is closed."""
        task = self._loop.create_task(self._give_back(kept))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @staticmethod
    async def _give_back(kept: HotConnection) -> None:
        if kept.driver.is_closed():
            await kept.owner.invalidate()
        await kept.owner.close()
