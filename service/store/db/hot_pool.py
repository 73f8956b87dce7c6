"""Statements run by the driver itself, and connections that are kept for the hot ones.

SQLAlchemy compiles the hot statements and owns the pool. The asyncpg connection under it runs the
compiled text, on connections that stay checked out while traffic flows. This saves the greenlet,
the wrapping of results and the reset at every release, which together cost more than the statement
itself (docs/explanation/performance.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from copy import copy
from typing import Any

import asyncpg
from sqlalchemy import ClauseElement
from sqlalchemy.dialects.postgresql import asyncpg as dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.store.db.driver_connection import DriverConnection
from service.store.db.schema_names import in_schema, schema_of
from service.store.tables import SCHEMA

MAX_IDLE_S = 2.0
"""Seconds after which an unused connection goes back to SQLAlchemy's pool."""

SYNC_TIMEOUT_S = 2.0
"""Seconds in which a connection whose caller was cancelled must respond, or it is closed."""

SLOW_STATEMENT_S = 2.0
"""Seconds after which a statement without a result suggests that the database is unavailable."""

Record = asyncpg.Record
_DIALECT = dialect.dialect()  # type: ignore[no-untyped-call]


class Statement:
    """A statement compiled once to the driver's text, with its parameters in order.

    Its tables are in the schema `tables.SCHEMA`; see `in_schema`.
    """

    __slots__ = ("names", "text")

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(
            dialect=_DIALECT, schema_translate_map={None: SCHEMA}, render_schema_translate=True
        )
        self.text: str = str(compiled)
        self.names: tuple[str, ...] = tuple(getattr(compiled, "positiontup", None) or ())

    @classmethod
    def from_text(cls, text: str) -> Statement:
        """Make a statement of SQL whose parameters are numbered already ($1, $2, …)."""
        self = cls.__new__(cls)
        self.text, self.names = text, ()
        return self

    def bind(self, **values: Any) -> tuple[Any, ...]:
        """Return named values in the order of the text."""
        return tuple(values[name] for name in self.names)

    def in_schema(self, schema: str) -> Statement:
        """Return the statement with its tables in a schema."""
        if schema == SCHEMA:
            return self
        statement = copy(self)
        statement.text = in_schema(self.text, schema)
        return statement


class SchemaStatements(dict[Statement, Statement]):
    """The statements of an installation, by those for `tables.SCHEMA`, made at their first use."""

    def __init__(self) -> None:
        super().__init__()
        self._schema = SCHEMA

    def use(self, schema: str) -> None:
        """Make the statements for another schema from now on."""
        if schema != self._schema:
            self.clear()
            self._schema = schema

    def __missing__(self, statement: Statement) -> Statement:
        translated = self[statement] = statement.in_schema(self._schema)
        return translated


async def fetch_in_transaction(
    driver: asyncpg.Connection, statement: Statement, *args: Any
) -> list[Record]:
    """Run a statement between BEGIN and COMMIT, and leave no transaction open on the connection.

    asyncpg's own transaction block is not used. When a caller is cancelled during its BEGIN,
    asyncpg treats the next block on the connection as nested: that one ends in RELEASE SAVEPOINT
    instead of COMMIT, and its changes are lost.

    Raises:
        Any error of the driver. A connection whose state is unknown is closed.
    """
    try:
        await driver.execute("BEGIN;")
        rows = await driver.fetch(statement.text, *args)
        await driver.execute("COMMIT")
    except asyncpg.PostgresError:
        # The statement failed. The connection can be used again unless the server has closed it.
        if not driver.is_closed() and driver.is_in_transaction():
            try:
                await driver.execute("ROLLBACK")
            except BaseException:
                driver.terminate()
                raise
        raise
    except BaseException:
        # A ROLLBACK would delay the cancelled caller for as long as an unresponsive network does.
        driver.terminate()
        raise
    return rows


async def fetch_on(connection: AsyncConnection, statement: Statement, *args: Any) -> list[Record]:
    """Run a statement by the driver on a connection whose transaction SQLAlchemy has begun.

    Raises:
        Any error of the driver.
    """
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert driver is not None  # noqa: S101 - it is checked out
    text = in_schema(statement.text, schema_of(connection))
    records: list[Record] = await driver.fetch(text, *args)
    return records


class Generation:
    """The current generation of connections. Those of an earlier one are closed and replaced.

    Their server may have become a standby, or their session is read-only although the server is
    writable again.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


class HotConnection:
    """One connection that is checked out of SQLAlchemy's pool."""

    __slots__ = ("checkout", "driver", "generation", "used_at")

    def __init__(
        self, checkout: AsyncConnection, driver: DriverConnection, generation: int, now: float
    ) -> None:
        self.checkout = checkout
        self.driver = driver
        self.generation = generation
        self.used_at = now
        """When it was last acquired or released, on the event loop's clock."""


class HotPool:
    """A pool of at most `size` connections, last in, first out. Further callers wait in line."""

    def __init__(self, engine: AsyncEngine, size: int, generation: Generation) -> None:
        self._engine = engine
        self._size = size
        self._generation = generation
        # Stored, since before Python 3.12 each look-up of the running loop costs a system call.
        self._loop = asyncio.get_running_loop()
        self._idle: list[HotConnection] = []
        self._busy: set[HotConnection] = set()
        self._opening = 0
        self._waiters: deque[asyncio.Future[HotConnection | None]] = deque()
        """Callers in line. Each receives a connection, or None when it may open one."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.on_slow_statement: Callable[[], None] = lambda: None
        """Called repeatedly while a statement has been in flight for more than SLOW_STATEMENT_S."""

    async def acquire(self) -> HotConnection:
        """Return a connection, opening one when none is idle and the limit allows.

        Raises:
            Any error of connecting; see `db_errors.classify`.
        """
        while True:
            while self._idle:
                connection = self._idle.pop()
                if not connection.driver.is_closed():
                    connection.used_at = self._loop.time()
                    self._busy.add(connection)
                    return connection
                self._return_to_engine(connection)
            if len(self._busy) + self._opening < self._size:
                return await self._open()
            received = await self._wait_in_line()
            if received is not None:
                if not received.driver.is_closed():
                    received.used_at = self._loop.time()
                    return received
                self._busy.discard(received)
                self._return_to_engine(received)

    async def _wait_in_line(self) -> HotConnection | None:
        waiter: asyncio.Future[HotConnection | None] = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # The waiter was served before the cancellation arrived: pass its turn on.
            if waiter.done() and not waiter.cancelled():
                connection = waiter.result()
                if connection is None:
                    self._serve_next_waiter(None)
                else:
                    self.release(connection)
            raise

    def release(self, connection: HotConnection) -> None:
        """Take a connection back, open or closed.

        An open one goes to the first waiter directly. If it became idle, a caller that acquires
        again without a pause would overtake the waiter every time.
        """
        if (
            connection.driver.is_closed()
            or self._is_closed
            or connection.generation != self._generation.number
        ):
            self._busy.discard(connection)
            self._return_to_engine(connection)
            self._serve_next_waiter(None)
        elif not self._serve_next_waiter(connection):
            self._busy.discard(connection)
            connection.used_at = self._loop.time()
            self._idle.append(connection)

    def release_abandoned(self, connection: HotConnection) -> None:
        """Take a connection of a cancelled caller back, once the server has ended the statement.

        asyncpg prepares a statement first, and sends no Sync until it runs the statement. A
        connection that is abandoned in between would keep its locks, and block a migration, until
        its next use.
        """
        if connection.driver.is_closed():
            self.release(connection)
            return
        self._start_task(self._sync_and_release(connection))

    async def _sync_and_release(self, connection: HotConnection) -> None:
        try:
            async with asyncio.timeout(SYNC_TIMEOUT_S):
                await connection.driver.execute("")
                connection.driver.is_unreplicated = False  # No caller waits for it.
        except Exception:  # noqa: BLE001 - whatever failed, the connection cannot be used again
            connection.driver.terminate()
        finally:
            self.release(connection)

    def terminate(self) -> None:
        """Close every connection now, so that calls on them do not wait for their timeouts."""
        for connection in (*self._idle, *self._busy):
            connection.driver.terminate()
        self.return_idle()

    def return_idle(self) -> None:
        """Return the idle connections to SQLAlchemy's pool now."""
        idle, self._idle = self._idle, []
        for connection in idle:
            self._return_to_engine(connection)

    async def close(self) -> None:
        """Return idle connections to SQLAlchemy's pool, and the others when they are released."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.return_idle()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self) -> HotConnection:
        self._opening += 1
        # The next generation may start before the connection is open.
        generation = self._generation.number
        try:
            checkout = await self._engine.connect()
            try:
                raw = await checkout.get_raw_connection()
                driver = raw.driver_connection
                assert driver is not None  # noqa: S101 - a fresh checkout has one
            except BaseException:
                await checkout.close()
                raise
        except BaseException:
            self._opening -= 1
            self._serve_next_waiter(None)
            raise
        self._opening -= 1
        connection = HotConnection(checkout, driver, generation, self._loop.time())
        self._busy.add(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(SLOW_STATEMENT_S / 2, self._check_connections)
        return connection

    def _serve_next_waiter(self, connection: HotConnection | None) -> bool:
        """Hand a busy connection, or the permission to open one, to a waiter if there is one."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    def _check_connections(self) -> None:
        """Return long idle connections and report slow statements, while there are connections."""
        now = self._loop.time()
        idle, self._idle = self._idle, []
        for connection in idle:
            if now - connection.used_at < MAX_IDLE_S:
                self._idle.append(connection)
            else:
                self._return_to_engine(connection)
        if any(now - connection.used_at > SLOW_STATEMENT_S for connection in self._busy):
            self.on_slow_statement()
        self._timer = None
        if self._idle or self._busy:
            self._timer = self._loop.call_later(SLOW_STATEMENT_S / 2, self._check_connections)

    def _return_to_engine(self, connection: HotConnection) -> None:
        """Return a connection to SQLAlchemy's pool, which forgets it if it is closed or too old."""
        self._start_task(self._end_checkout(connection))

    async def _end_checkout(self, connection: HotConnection) -> None:
        if connection.driver.is_closed() or connection.generation != self._generation.number:
            await connection.checkout.invalidate()
        await connection.checkout.close()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
