"""Creates SQLAlchemy's engines: with a pool for calls, and without one for probes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import asyncpg
from sqlalchemy import NullPool, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only

from service.store.db.connector import LOCK_TIMEOUT, Connector
from service.store.db.driver_connection import (
    LOCK_TIMEOUT_S,
    DriverConnection,
    PoolerConnection,
)
from service.store.db.dsn import PREPARED_STATEMENTS, Route, Target
from service.store.db.hot_pool import Generation

PING_AFTER_IDLE_S = 30.0
"""Seconds after which an idle connection is pinged before use."""
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""An escaped NUL, but no escaped backslash that precedes `u0000`."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
COMMAND_TIMEOUT_S = 60.0
"""Seconds after which the driver cancels any statement, whatever its caller's deadline."""


def pooled_engine(
    target: Target,
    connector: Connector,
    generation: Generation,
    *,
    pool_size: int,
    max_overflow: int,
    pool_timeout_s: float,
    recycle_s: int,
    connect_timeout_s: float,
) -> AsyncEngine:
    """Create an engine that keeps connections open, recycles them, and pings those long idle."""
    engine = create_async_engine(
        target.url,
        connect_args=_connect_args(target, connector, connect_timeout_s),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=pool_timeout_s,
        pool_recycle=recycle_s,
        # The least used connections age and are recycled, so that few are open when the database is
        # suspended.
        pool_use_lifo=True,
        hide_parameters=True,
        json_serializer=_json_text,
    )
    _follow_route(engine, connector, _service_options)
    _check_connections(engine, generation)
    return engine


def unpooled_engine(
    target: Target, connector: Connector, *, connect_timeout_s: float
) -> AsyncEngine:
    """Create an engine that opens a connection for each use."""
    engine = create_async_engine(
        target.url,
        connect_args=_connect_args(target, connector, connect_timeout_s),
        poolclass=NullPool,
        hide_parameters=True,
        json_serializer=_json_text,
    )
    _follow_route(engine, connector, _service_options)
    return engine


def single_use_engine(target: Target, *, connect_timeout_s: float) -> AsyncEngine:
    """Create an engine for one connection of a command, such as a migration, without timeouts."""
    connector = Connector(target)
    engine = create_async_engine(
        target.url,
        connect_args={
            "timeout": connect_timeout_s,
            **target.connect_args,
            "async_creator_fn": connector.connect,
        },
        poolclass=NullPool,
        hide_parameters=True,
    )
    _follow_route(engine, connector, _route_options)
    return engine


async def find_target_route(target: Target, *, connect_timeout_s: float) -> Target:
    """Return a target with its route, found by connecting unless it is configured.

    Raises:
        UnusableDatabase: the pooler cannot be used as it is.
        Any error of connecting.
    """
    if target.route is not None:
        return target
    routed = target

    def use_route(target_with_route: Target) -> None:
        nonlocal routed
        routed = target_with_route

    connector = Connector(target)
    connector.on_route = use_route
    engine = unpooled_engine(target, connector, connect_timeout_s=connect_timeout_s)
    try:
        async with engine.connect():
            return replace(routed, read_again=None)
    finally:
        await engine.dispose()


def _json_text(value: Any) -> str:
    """Return a value as JSON that PostgreSQL accepts: its error would log the text at the fault.

    Raises:
        ValueError: the value contains NaN, an infinity, NUL or half of a surrogate pair.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    if _NUL.search(text) or _SURROGATE.search(text):
        raise ValueError("jsonb cannot store NUL and unpaired surrogates")
    return text


def _connect_args(target: Target, connector: Connector, connect_timeout_s: float) -> dict[str, Any]:
    """Return asyncpg's arguments; the target's own, such as a connect timeout, have precedence."""
    return {
        "timeout": connect_timeout_s,
        "command_timeout": COMMAND_TIMEOUT_S,
        **target.connect_args,
        "async_creator_fn": connector.connect,
    }


def _route_options(routed: Target) -> dict[str, Any]:
    """Return the arguments of asyncpg and SQLAlchemy that depend on the route."""
    names = ("server_settings", *PREPARED_STATEMENTS)
    return {name: routed.connect_args[name] for name in names if name in routed.connect_args}


def _service_options(routed: Target) -> dict[str, Any]:
    """Return the arguments that depend on the route, for connections of the service."""
    options = _route_options(routed)
    is_direct = routed.route is Route.DIRECT
    options["connection_class"] = DriverConnection if is_direct else PoolerConnection
    if routed.route is not Route.TRANSACTION:
        # A statement waits for locks on its tables before it can set a timeout of its own. Those
        # through a pooler are in transactions that set it, and the pooler rejects the parameter.
        options["server_settings"] = {
            LOCK_TIMEOUT: f"{LOCK_TIMEOUT_S * 1000:.0f}",
            **options["server_settings"],
        }
    return options


def _follow_route(
    engine: AsyncEngine, connector: Connector, options_of: Callable[[Target], dict[str, Any]]
) -> None:
    """Give each new connection the arguments of the route, which the first one finds out."""

    def connecting(
        _dialect: object, _entry: object, _args: object, arguments: dict[str, Any]
    ) -> None:
        options = {
            name: value
            for name, value in arguments.items()
            if name not in ("async_creator_fn", "prepared_statement_cache_size")
        }
        arguments |= options_of(await_only(connector.routed_target(options)))

    event.listen(engine.sync_engine, "do_connect", connecting)


def _has_transaction(driver: asyncpg.Connection) -> bool:
    """Return whether a connection of the pool is in a transaction, by the server or the driver.

    A caller that is cancelled in BEGIN or COMMIT may leave one. asyncpg would nest the next
    transaction in it, whose COMMIT would commit nothing, or refuse every further one.
    """
    return driver.is_in_transaction() or driver._top_xact is not None  # type: ignore[attr-defined] # noqa: SLF001


def _check_connections(engine: AsyncEngine, generation: Generation) -> None:
    """Close connections that come back with a transaction or are of an earlier generation.

    Those that were idle for long are pinged. Only those: each ping costs up to four round trips.
    """

    def connected(_connection: object, entry: ConnectionPoolEntry) -> None:
        entry.info["generation"] = generation.number

    def checked_in(connection: Any, entry: ConnectionPoolEntry) -> None:
        if connection is not None and _has_transaction(connection.driver_connection):
            entry.invalidate()
        entry.info["idle_since"] = time.monotonic()

    def checked_out(
        connection: Any, entry: ConnectionPoolEntry, _proxy: PoolProxiedConnection
    ) -> None:
        if entry.info.get("generation") != generation.number:
            raise DisconnectionError("the server may have another role by now")
        if _has_transaction(connection.driver_connection):  # Begun after the check-in.
            raise DisconnectionError("the connection was left in a transaction")
        idle_since = entry.info.get("idle_since")
        if idle_since is not None and time.monotonic() - idle_since > PING_AFTER_IDLE_S:
            try:
                engine.sync_engine.dialect.do_ping(connection)
            except Exception as error:
                raise DisconnectionError("the connection was lost while idle") from error

    event.listen(engine.sync_engine, "connect", connected)
    event.listen(engine.sync_engine, "checkin", checked_in)
    event.listen(engine.sync_engine, "checkout", checked_out)
