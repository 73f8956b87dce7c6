"""Compares the replica with the primary, for `chat-history check`."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.dsn import Target
from service.store.db.engine import single_use_engine
from service.store.db.schema_names import in_schema
from service.store.schema.location import find

_EPOCH = "SELECT epoch::text FROM chathistory.history_epoch WHERE id = 1"
_WRITTEN = "SELECT pg_current_wal_lsn()::text"
_BEHIND = (
    "SELECT pg_wal_lsn_diff(CAST(CAST(:written AS text) AS pg_lsn), "
    "pg_last_wal_replay_lsn())::bigint WHERE pg_is_in_recovery()"
)


class ReplicaStatus(NamedTuple):
    """A replica, compared with the primary."""

    is_same_history: bool
    """Whether its data is that of the primary, at some time."""
    is_standby: bool
    behind_bytes: int | None
    """Bytes of the primary's log that it has not replayed; None if that is not known."""


async def compare_replica(
    primary: Target, replica: Target, timeout_s: float
) -> ReplicaStatus | None:
    """Connect to both, and compare them.

    Returns:
        The result; None if the primary has no tables yet.

    Raises:
        Any of `DATABASE_ERRORS`.
    """
    engine = single_use_engine(primary, connect_timeout_s=timeout_s)
    try:
        async with engine.connect() as connection:
            epoch = await _epoch(connection, primary)
            written = await _value(connection, _WRITTEN)
    finally:
        await engine.dispose()
    if epoch is None:
        return None
    engine = single_use_engine(replica, connect_timeout_s=timeout_s)
    try:
        async with engine.connect() as connection:
            is_standby = bool(await connection.scalar(text("SELECT pg_is_in_recovery()")))
            own_epoch = await _epoch(connection, replica)
            behind_bytes = None
            if is_standby and written is not None:
                behind = await _value(connection, _BEHIND, written=written)
                behind_bytes = None if behind is None else max(0, int(behind))
    finally:
        await engine.dispose()
    return ReplicaStatus(own_epoch == epoch, is_standby, behind_bytes)


async def _epoch(connection: AsyncConnection, target: Target) -> str | None:
    """Return the id of the history; None if the database has no tables of ours."""
    location = await find(connection)
    if not location.usable and target.schema is None:
        return None
    return await _value(connection, in_schema(_EPOCH, location.choose(target.schema)))


async def _value(connection: AsyncConnection, sql: str, **values: str) -> str | None:
    """Return one value; None where the server has no such function or table."""
    try:
        async with connection.begin_nested():
            value = await connection.scalar(text(sql), values)
    except DATABASE_ERRORS:
        return None
    return None if value is None else str(value)
