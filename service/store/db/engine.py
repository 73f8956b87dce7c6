"""Creates SQLAlchemy's engines: with a pool for calls, and without one for probes."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import asyncpg
from sqlalchemy import NullPool, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from service.store.db.connector import LOCK_TIMEOUT, Connector
from service.store.db.dsn import Target
from service.store.db.hot_pool import (
    LOCK_TIMEOUT_S,
    DriverConnection,
    Generation,
    PoolerConnection,
)

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
    _check_connections(engine, generation)
    return engine


def unpooled_engine(
    target: Target, connector: Connector, *, connect_timeout_s: float
) -> AsyncEngine:
    """Create an engine that opens a connection for each use."""
    return create_async_engine(
        target.url,
        connect_args=_connect_args(target, connector, connect_timeout_s),
        poolclass=NullPool,
        hide_parameters=True,
        json_serializer=_json_text,
    )


def single_use_engine(target: Target, *, connect_timeout_s: float) -> AsyncEngine:
    """Create an engine for one connection of a command, such as a migration, without timeouts."""
    return create_async_engine(
        target.url,
        connect_args={
            "timeout": connect_timeout_s,
            **target.connect_args,
            "async_creator_fn": Connector(target).connect,
        },
        poolclass=NullPool,
        hide_parameters=True,
    )


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
    arguments = {
        "timeout": connect_timeout_s,
        "command_timeout": COMMAND_TIMEOUT_S,
        **target.connect_args,
        "connection_class": PoolerConnection if target.is_pooled else DriverConnection,
        "async_creator_fn": connector.connect,
    }
    if not target.is_pooled:
        # A statement waits for locks on its tables before it can set a timeout of its own. Those
        # through a pooler are in transactions that set it, and the pooler rejects the parameter.
        arguments["server_settings"] = {
            LOCK_TIMEOUT: f"{LOCK_TIMEOUT_S * 1000:.0f}",
            **target.connect_args["server_settings"],
        }
    return arguments


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
