"""Finds out what is between the service and PostgreSQL, by the behaviour of connections.

Host names and ports do not show it. Two observations do:

- At the start of a connection the server announces the id of its process. When another process
  answers, the connection goes through a proxy or a pooler.
- A transaction pooler lends a process for the time of one transaction. The transactions of one
  connection then meet several processes, or those of two connections meet the same one. Other
  proxies, such as Neon's for its direct hosts, keep a process for each connection.

Prepared statements, settings and locks of a session prove nothing on a single connection: an idle
pooler lends the same process again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import asyncpg

from service.store.db.db_errors import DATABASE_ERRORS, driver_error
from service.store.db.dsn import Route
from service.store.db.hot_pool import Statement, fetch_in_transaction
from service.store.schema.location import UnusableDatabase

ROUNDS = 4
"""Pairs of concurrent transactions. On a pooler that is in use, one pair may not show that the
connections share processes."""
SHARING_TIMEOUT_S = 3.0
"""Seconds in which a second connection shows whether it shares processes with the first one. It
takes about 30 round trips."""
CLOSE_TIMEOUT_S = 1.0
"""Seconds in which a connection may close gracefully."""
_PROCESS_ID = Statement.from_text("SELECT pg_backend_pid()")
_STATEMENT_MODE = (
    "the pooler is in statement mode, which rejects transactions: set pool_mode = transaction, or "
    "session"
)

Open = Callable[[], Awaitable[asyncpg.Connection]]
"""Opens a connection that prepares no statement by name, and sends no start-up parameter that a
pooler rejects."""


class FoundRoute(NamedTuple):
    """A route, and how it was found."""

    route: Route
    evidence: str
    """For the log and for `check`."""


BY_ERRORS = FoundRoute(Route.TRANSACTION, "prepared statements were missing")
"""A pooler that the observations did not show."""
_DIRECT = FoundRoute(Route.DIRECT, "the process that the server announced answers")
_SESSION = FoundRoute(Route.SESSION, "another process answers, the same one for each connection")
_TRANSACTION = FoundRoute(Route.TRANSACTION, "connections share the processes of the server")
_UNKNOWN = FoundRoute(
    Route.TRANSACTION, "another process answers, and a second connection was not served"
)
"""A session pooler without a free process behaves so. The assumption works for it, too."""


async def find_direct_route(first: asyncpg.Connection) -> FoundRoute | None:
    """Return the route if a connection is direct; else it is still open, for `find_proxied_route`.

    Raises:
        UnusableDatabase: the pooler rejects transactions.
        Any error of the driver.
    """
    try:
        is_direct = await _find_process(first) == first.get_server_pid()
    except BaseException:
        first.terminate()
        raise
    if not is_direct:
        return None
    await _close(first)
    return _DIRECT


async def find_proxied_route(first: asyncpg.Connection, open_connection: Open) -> FoundRoute:
    """Find the route of a connection that is not direct, by a second one; the first is closed."""
    try:
        async with asyncio.timeout(SHARING_TIMEOUT_S):
            shares = await _shares_processes(first, open_connection)
    except DATABASE_ERRORS:
        return _UNKNOWN
    finally:
        await _close(first)
    return _TRANSACTION if shares else _SESSION


async def _shares_processes(first: asyncpg.Connection, open_connection: Open) -> bool:
    """Return whether the connections have no process of their own."""
    second = await open_connection()
    try:
        # Not concurrent at first: an idle pooler lends the process that was used last.
        of_first, of_second = {await _find_process(first)}, {await _find_process(second)}
        for _ in range(ROUNDS):
            if len(of_first) > 1 or len(of_second) > 1 or of_first & of_second:
                return True
            process_ids = await asyncio.gather(_find_process(first), _find_process(second))
            of_first.add(process_ids[0])
            of_second.add(process_ids[1])
        return len(of_first) > 1 or len(of_second) > 1
    finally:
        await _close(second)


async def _find_process(connection: asyncpg.Connection) -> int:
    """Return the id of the process that runs a transaction.

    Raises:
        UnusableDatabase: the pooler rejects transactions.
        Any error of the driver.
    """
    try:
        [row] = await fetch_in_transaction(connection, _PROCESS_ID)
    except DATABASE_ERRORS as error:
        if "statement pooling mode" in str(driver_error(error)):
            raise UnusableDatabase(_STATEMENT_MODE) from None
        raise
    return int(row[0])


async def _close(connection: asyncpg.Connection) -> None:
    try:
        await connection.close(timeout=CLOSE_TIMEOUT_S)
    except DATABASE_ERRORS:
        connection.terminate()
