"""Opens connections: tries the servers of a target in order, and checks the role of each.

asyncpg's own list of hosts is not used. Its timeout is for all hosts together, so that one which
does not answer uses it up (github.com/MagicStack/asyncpg/issues/1155). It goes on to the next host
after an OSError and 57P03 only. Behind a pooler it would trust parameters that the pooler has
stored from an earlier server.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any

import asyncpg

from service.store.db.addresses import Address
from service.store.db.db_errors import NoServer, WrongRole
from service.store.db.driver_connection import PoolerConnection
from service.store.db.dsn import Route, Target
from service.store.db.hot_pool import Statement, fetch_in_transaction
from service.store.db.route import BY_ERRORS, FoundRoute, find_direct_route, find_proxied_route
from service.store.db.transports import Transports
from service.store.schema.location import UnusableDatabase

MAX_HOST_TIMEOUT_S = 3.0
"""Seconds that connecting to one of several servers may take, unless the URL limits it itself."""
SLOW_HOST_S = 30.0
"""Seconds for which a server that did not answer in time is tried after the others."""
SUSPICIOUS_WAIT_S = 0.5
"""Seconds after which a cancelled attempt shows that a server does not answer."""
_CONNECT_ERRORS = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
LOCK_TIMEOUT = "lock_timeout"
"""A start-up parameter of connections to a server."""
_SET_LOCK_TIMEOUT = f"SELECT set_config('{LOCK_TIMEOUT}', $1, false)"
_ROLE = Statement.from_text(
    "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'"
)


class Role(Enum):
    """The use of a server; the value is its description in messages."""

    WRITABLE = "writable"
    READ_ONLY = "read-only"
    """A primary whose sessions are read-only. It serves reads while no server is writable."""
    STANDBY = "a standby"
    """Used only for reads that may lag: others must return what was acknowledged before."""


class Suitability(Enum):
    """The suitability of a role for a target."""

    SUITABLE = auto()
    FALLBACK = auto()
    UNSUITABLE = auto()


class Connector:
    """Opens connections of one target, as SQLAlchemy's `async_creator_fn`."""

    def __init__(self, target: Target) -> None:
        self.on_route: Callable[[Target], None] = lambda _: None
        """Called with the target when its route is found."""
        self._configured = target
        self._target = target
        """The target as its files were when the last connection was opened."""
        self._routed = target if target.route is not None else None
        self._finding: asyncio.Task[FoundRoute] | None = None
        """Finds the route of a connection that is not direct."""
        self._tasks: set[asyncio.Task[FoundRoute]] = set()
        self._lacks_statements = False
        """Whether prepared statements were missing."""
        self._preferred: Address | None = None
        """The server of the last suitable connection: the first one to be tried."""
        self._slow_until: dict[Address, float] = {}
        self._transports = Transports()
        self._omits_lock_timeout = False
        """Whether it was rejected, as by a pooler that was not recognized."""

    @property
    def route(self) -> Route | None:
        """The way to the server; None before the first connection."""
        return None if self._routed is None else self._routed.route

    @property
    def evidence(self) -> str:
        """How the route was found."""
        return "" if self._routed is None else self._routed.evidence

    async def routed_target(self, options: dict[str, Any]) -> Target:
        """Return the target for the next connection, with its route.

        The route is found by a connection of its own, unless it is configured or known already.

        Args:
            options: The arguments of `asyncpg.connect`. Those that depend on the route are
                replaced.

        Raises:
            UnusableDatabase: the pooler cannot be used as it is.
            Any error of connecting.
        """
        target = self._configured.current()
        if target is not self._target:
            self._target = target
            self._routed = target if target.route is not None else None
            self._finding = None
        if self._routed is not None:
            return self._routed
        answer = BY_ERRORS if self._lacks_statements else await self._find_route(options)
        try:
            routed = target.with_route(*answer)
        except ValueError as error:
            raise UnusableDatabase(str(error)) from None
        if target is self._target:
            self._routed = routed
            self.on_route(routed)
        return routed

    async def _find_route(self, options: dict[str, Any]) -> FoundRoute:
        def open_connection() -> Awaitable[asyncpg.Connection]:
            return self.connect(**options)

        application_name = self._target.connect_args["server_settings"]["application_name"]
        options = options | {
            "connection_class": PoolerConnection,
            "statement_cache_size": 0,
            "server_settings": {"application_name": application_name, "client_encoding": "UTF8"},
        }
        finding = self._finding
        if finding is None:
            first = await open_connection()
            if (direct := await find_direct_route(first)) is not None:
                return direct
            finding = asyncio.get_running_loop().create_task(
                find_proxied_route(first, open_connection)
            )
            self._finding = finding
            self._tasks.add(finding)
            finding.add_done_callback(self._end_finding)
        # The task goes on when this caller's time is up, so that the next one finds the route.
        return await asyncio.shield(finding)

    def _end_finding(self, task: asyncio.Task[FoundRoute]) -> None:
        self._tasks.discard(task)
        if self._finding is task and (task.cancelled() or task.exception() is not None):
            self._finding = None

    async def close(self) -> None:
        """End the search for the route, if it is in progress."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def note_missing_statement(self) -> bool:
        """Treat the route as a transaction pooler from now on, since it lost a prepared statement.

        Returns:
            Whether that makes a difference for new connections.
        """
        if self._lacks_statements or self._configured.route is not None:
            return False
        self._lacks_statements = True
        self._routed = None
        return True

    async def connect(self, **options: Any) -> asyncpg.Connection:
        """Open a connection to the first server with a suitable role.

        Args:
            options: The arguments of `asyncpg.connect`. Host and port are replaced, and what the
                files of the configuration name.

        Raises:
            WrongRole: the only server has an unsuitable role.
            NoServer: none of several servers can be used.
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError: connecting to the only server
                failed.
        """
        # Neither the driver's environment variable for this nor the password file in the home
        # folder, which may belong to another user.
        options["target_session_attrs"] = "any"
        if self._configured.read_again is not None:
            url = self._target.url
            options |= {
                "user": url.username,
                "password": url.password,
                "database": url.database,
                "ssl": self._target.connect_args["ssl"],
            }
        if options.get("password") is None and not (
            "passfile" in options or "PGPASSFILE" in os.environ
        ):
            options["password"] = os.environ.get("PGPASSWORD", "")
        addresses = self._target.addresses
        if len(addresses) > 1:
            return await self._connect_to_one_of(addresses, options)
        if addresses:
            options |= addresses[0]._asdict()
        connection = await self._open(options)
        # A pooler may have no server yet. The probe of readiness checks the role behind it, and so
        # does each transaction that only reads.
        if self.route not in (Route.DIRECT, Route.SESSION):
            return connection
        try:
            async with asyncio.timeout(options["timeout"]):
                role = await self._find_role(connection)
        except BaseException:
            connection.terminate()
            raise
        if self._suitability(role) is Suitability.UNSUITABLE:
            connection.terminate()
            raise WrongRole(role.value)
        return connection

    async def _connect_to_one_of(
        self, addresses: tuple[Address, ...], options: dict[str, Any]
    ) -> asyncpg.Connection:
        if not self._target.has_connect_timeout:
            options["timeout"] = min(options["timeout"], MAX_HOST_TIMEOUT_S)
        failures: list[tuple[Address, BaseException]] = []
        fallback: asyncpg.Connection | None = None
        try:
            for address in self._in_order(addresses):
                try:
                    connection, role = await self._open_and_check(address, options)
                except _CONNECT_ERRORS as error:
                    failures.append((address, error))
                    continue
                suitability = self._suitability(role)
                if suitability is Suitability.SUITABLE:
                    self._preferred = address
                    return connection
                if suitability is Suitability.FALLBACK and fallback is None:
                    fallback = connection
                else:
                    connection.terminate()
                    failures.append((address, WrongRole(role.value)))
            if fallback is None:
                raise NoServer(failures)
            connection, fallback = fallback, None
            return connection
        finally:
            if fallback is not None:
                fallback.terminate()

    def _in_order(self, addresses: tuple[Address, ...]) -> list[Address]:
        """Return the servers: the last suitable one first, those that did not answer last."""
        now = _now()
        return sorted(
            addresses,
            key=lambda address: (
                self._slow_until.get(address, now) > now,
                address != self._preferred,
            ),
        )

    def _suitability(self, role: Role) -> Suitability:
        attrs = self._target.session_attrs
        if self._target.is_replica:
            if role is not Role.WRITABLE:
                return Suitability.SUITABLE
            return Suitability.UNSUITABLE if attrs == "standby" else Suitability.FALLBACK
        if role is Role.WRITABLE:
            return Suitability.SUITABLE
        if role is Role.STANDBY or attrs == "read-write":
            return Suitability.UNSUITABLE
        if attrs == "primary":
            return Suitability.SUITABLE
        return Suitability.FALLBACK

    async def _open_and_check(
        self, address: Address, options: dict[str, Any]
    ) -> tuple[asyncpg.Connection, Role]:
        started_at = _now()
        try:
            # asyncpg's own timeout does not include the statement.
            async with asyncio.timeout(options["timeout"]):
                connection = await self._open(options | address._asdict())
                try:
                    role = await self._find_role(connection)
                except BaseException:
                    connection.terminate()
                    raise
        except (TimeoutError, asyncio.CancelledError):
            # The caller's own timeout may be shorter. Its next attempt begins with another server.
            if _now() - started_at >= min(options["timeout"], SUSPICIOUS_WAIT_S):
                self._slow_until[address] = _now() + SLOW_HOST_S
            raise
        self._slow_until.pop(address, None)
        return connection, role

    async def _find_role(self, connection: asyncpg.Connection) -> Role:
        if self.route is Route.DIRECT:
            return _reported_role(connection)
        # A pooler reports the parameters of the first server to which it has ever connected.
        [(is_standby, is_read_only)] = await fetch_in_transaction(connection, _ROLE)
        return _role(is_standby=is_standby, is_read_only=is_read_only)

    async def _open(self, options: dict[str, Any]) -> asyncpg.Connection:
        """Open one connection, and set the lock timeout later if a proxy does not accept it."""
        if not self._omits_lock_timeout:
            try:
                return await self._transports.open(options)
            except asyncpg.ProtocolViolationError as error:
                if LOCK_TIMEOUT not in str(error):
                    raise
            self._omits_lock_timeout = True
        settings = dict(options.get("server_settings") or {})
        lock_timeout = settings.pop(LOCK_TIMEOUT, None)
        connection = await self._transports.open(options | {"server_settings": settings})
        if lock_timeout is not None:
            try:
                async with asyncio.timeout(options.get("timeout")):
                    await connection.fetch(_SET_LOCK_TIMEOUT, lock_timeout)
            except BaseException:
                connection.terminate()
                raise
        return connection


def _reported_role(connection: asyncpg.Connection) -> Role:
    """Return the role that the server, from version 14 on, reports at the start of a session."""
    settings = connection.get_settings()
    return _role(
        is_standby=getattr(settings, "in_hot_standby", "off") == "on",
        is_read_only=getattr(settings, "default_transaction_read_only", "off") == "on",
    )


def _role(*, is_standby: bool, is_read_only: bool) -> Role:
    if is_standby:
        return Role.STANDBY
    return Role.READ_ONLY if is_read_only else Role.WRITABLE


def _now() -> float:
    return asyncio.get_running_loop().time()
