"""Moves the tables of an installation into another schema, while no service runs.

Services of the first release find their tables by `search_path`, so they cannot follow a move.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import tables
from service.store.db.db_errors import LOCK_NOT_AVAILABLE, sqlstate
from service.store.db.dsn import Target
from service.store.db.engine import single_use_engine
from service.store.db.schema_names import quote
from service.store.schema.location import Location, find
from service.store.schema.migrations import (
    ADVISORY_LOCK_KEY,
    CONNECT_TIMEOUT_S,
    MigrationError,
    create_schema,
)
from service.store.schema.version import VERSION_TABLE

DISCONNECT_TIMEOUT_S = 2.0
"""Seconds to wait for the connections of services that were just stopped."""

_FIND_SERVICES = text("""
    SELECT pid, client_addr::text
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
      AND application_name = :application
    ORDER BY pid
""")
_FIND_TABLES = text("""
    SELECT c.relname::text
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :schema AND c.relkind IN ('r', 'p')
      AND c.relname = ANY (CAST(:names AS text[]))
    ORDER BY 1
""")
# The roles with rights on the tables need the right to use the new schema.
_FIND_GRANTEES = text("""
    SELECT DISTINCT coalesce(quote_ident(r.rolname), 'PUBLIC')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL aclexplode(c.relacl) AS a
    LEFT JOIN pg_roles AS r ON r.oid = a.grantee
    WHERE n.nspname = :schema AND c.relname = ANY (CAST(:names AS text[]))
      AND a.grantee <> c.relowner
    ORDER BY 1
""")
_HAS_DEFAULT_PRIVILEGES = text("""
    SELECT EXISTS (
        SELECT FROM pg_default_acl AS d JOIN pg_namespace AS n ON n.oid = d.defaclnamespace
        WHERE n.nspname = :schema)
""")


class Move(NamedTuple):
    """Result of a move; `str` returns it as a sentence."""

    source: str
    destination: str
    table_count: int
    has_default_privileges: bool
    """Whether the source has default privileges, which the destination lacks."""

    def __str__(self) -> str:
        if not self.table_count:
            return f"nothing to do: the tables are in the schema {self.destination}"
        return (
            f"moved {self.table_count} tables from {self.source} to {self.destination}:"
            " the services can be started"
        )


async def move(target: Target, destination: str, *, force: bool = False) -> Move:
    """Move the tables in one transaction. Rights on them, their indexes and constraints move along.

    Args:
        target: The database. For a pooled Neon host, the direct host is used.
        destination: The schema to move the tables into; created if it does not exist.
        force: Whether to ignore connections that a service has open. It is for names of
            applications that a pooler has made equal.

    Raises:
        MigrationError: a service runs, the tables are locked, or a schema does not fit.
        Exception: the connection or a statement failed.
    """
    target = target.direct()
    engine = single_use_engine(target, connect_timeout_s=CONNECT_TIMEOUT_S)
    try:
        async with engine.begin() as connection:
            lock = select(func.pg_try_advisory_xact_lock(ADVISORY_LOCK_KEY))  # Of all migrators.
            if not await connection.scalar(lock):
                raise MigrationError("a migration is in progress: move when it has ended")
            source = _find_source(await find(connection), target.schema, destination)
            if source is None:
                return Move(destination, destination, 0, False)
            if not force:
                application = target.connect_args["server_settings"]["application_name"]
                await _check_stopped(connection, application)
            return await _move(connection, source, destination)
    finally:
        await engine.dispose()


def _find_source(location: Location, configured: str | None, destination: str) -> str | None:
    """Return the schema with the tables; None if it is the destination.

    Raises:
        MigrationError: there is not exactly one to move.
    """
    sources = [name for name in location.usable if name != destination]
    if destination in location.usable:
        if not sources or configured == destination:
            return None
        raise MigrationError(f"the schema {destination} has tables of ChatHistory already")
    if configured in sources:
        return configured
    if len(sources) > 1:
        raise MigrationError(
            f"the schemas {', '.join(sources)} hold tables of ChatHistory:"
            " set CHAT_HISTORY_DB_SCHEMA to the one to move"
        )
    if not sources:
        raise MigrationError(
            "no schema of this database has tables of ChatHistory: run `chat-history migrate`"
        )
    return sources[0]


async def _check_stopped(connection: AsyncConnection, application: str) -> None:
    """Check that no service is connected; a server's process may end some time after its client.

    Raises:
        MigrationError: one is.
    """
    deadline = asyncio.get_running_loop().time() + DISCONNECT_TIMEOUT_S
    while services := (
        await connection.execute(_FIND_SERVICES, {"application": application})
    ).all():
        if asyncio.get_running_loop().time() > deadline:
            backends = ", ".join(
                f"{pid} (from {address or 'a socket'})" for pid, address in services
            )
            raise MigrationError(
                f"stop the services first: {application} is connected, as the server's processes"
                f" {backends}"
            )
        await asyncio.sleep(0.1)
        # Otherwise the transaction would read the same list again.
        await connection.execute(select(func.pg_stat_clear_snapshot()))


async def _move(connection: AsyncConnection, source: str, destination: str) -> Move:
    values = {"schema": source, "names": [*tables.metadata.tables, VERSION_TABLE]}
    names = [str(name) for name in await connection.scalars(_FIND_TABLES, values)]
    await _check_version(connection, source)
    try:
        await connection.exec_driver_sql(
            f"LOCK TABLE {', '.join(f'{quote(source)}.{name}' for name in names)}"
            " IN ACCESS EXCLUSIVE MODE NOWAIT"
        )
    except DBAPIError as error:
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        raise MigrationError("the tables are in use: stop the services first") from None
    grantees = [str(name) for name in await connection.scalars(_FIND_GRANTEES, values)]
    await create_schema(connection, destination)
    for name in names:
        await connection.exec_driver_sql(
            f"ALTER TABLE {quote(source)}.{name} SET SCHEMA {quote(destination)}"
        )
    for role in grantees:
        await connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA {quote(destination)} TO {role}")
    has_defaults = await connection.scalar(_HAS_DEFAULT_PRIVILEGES, {"schema": source})
    return Move(source, destination, len(names), bool(has_defaults))


async def _check_version(connection: AsyncConnection, schema: str) -> None:
    """Check that the table of the revision is ours, and not another application's as well.

    Raises:
        MigrationError: it is not.
    """
    table = f"{quote(schema)}.{VERSION_TABLE}"
    versions = await connection.exec_driver_sql(
        f"SELECT version_num FROM {table}"  # noqa: S608 - only names are inserted
    )
    revisions = [str(revision) for revision in versions.scalars()]
    if len(revisions) != 1 or not revisions[0].isdecimal():
        raise MigrationError(
            f"the table {table} holds revisions of another application: give that application a"
            " version table of its own first"
        )
