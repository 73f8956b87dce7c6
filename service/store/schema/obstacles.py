"""Finds what is in the way of our tables: missing rights, and tables of other applications."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.schema_names import quote
from service.store.schema.location import find
from service.store.schema.version import VERSION_TABLE
from service.store.tables import metadata

_LEFT_BEHIND = {
    "documents": ("content_sha256", "chunk_count", "status_detail", "fingerprint"),
    "document_chunks": ("document_id", "chunk_index", "vector"),
    "search_outbox": ("entity_id", "taken_through", "owed_at"),
    "search_indexes": ("after_entity_id", "handed_out", "lease_until"),
    "session_tombstones": ("user_id", "session_id", "deleted_at"),
}
"""The tables of the second and the third migration, with columns that identify them as ours."""
_COLUMNS = ", ".join(
    f"('{table}', '{column}')" for table, columns in _LEFT_BEHIND.items() for column in columns
)
_FIND_LEFT_BEHIND = text(f"""
    WITH wanted (table_name, column_name) AS (VALUES {_COLUMNS})
    SELECT n.nspname::text AS schema, array_agg(c.relname::text ORDER BY c.relname) AS tables,
           EXISTS (SELECT FROM pg_class AS v
                   WHERE v.relnamespace = n.oid AND v.relname = :version_table) AS has_version
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND c.relname IN (SELECT w.table_name FROM wanted AS w)
      AND n.nspname !~ '^pg_' AND n.nspname <> ALL (CAST(:ours AS text[]))
      AND NOT EXISTS (
        SELECT FROM wanted AS w
        WHERE w.table_name = c.relname AND NOT EXISTS (
            SELECT FROM pg_attribute AS a
            WHERE a.attrelid = c.oid AND a.attname = w.column_name AND NOT a.attisdropped))
    GROUP BY n.oid, n.nspname
    ORDER BY 1
""")  # noqa: S608 - only constants are inserted
_READ_RIGHTS = text("""
    SELECT has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
           current_user::text AS role,
           (SELECT has_schema_privilege(n.oid, 'CREATE')
            FROM pg_namespace AS n WHERE n.nspname = :schema) AS may_create_tables
""")
_FIND_TABLES = text("""
    SELECT c.relname::text
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :schema AND c.relname = ANY (CAST(:names AS text[]))
    ORDER BY 1
""")


class LeftBehind(NamedTuple):
    """Tables of ours that release 0.1.0 created among those of another application.

    It took the application's tables `users` and `alembic_version` for its own.
    """

    schema: str
    tables: tuple[str, ...]
    has_version: bool
    """Whether the schema has a table `alembic_version`, whose revision was then changed."""

    def __str__(self) -> str:
        schema = quote(self.schema)
        names = ", ".join(f"{schema}.{name}" for name in self.tables)
        message = (
            f"release 0.1.0 has left {', '.join(self.tables)} among the tables of another"
            f" application in the schema {self.schema}, whose deletions of users cascade to them:"
            f" run DROP TABLE {names}"
        )
        if self.has_version:
            # The release began with the revision after the application's own.
            revision = "0001" if "documents" in self.tables else "0002"
            message += (
                f", and set {schema}.{VERSION_TABLE} back to the application's revision, which was"
                f" {revision} if its migrations have not run since"
            )
        return message


async def find_left_behind(
    connection: AsyncConnection, schemas: Sequence[str]
) -> tuple[LeftBehind, ...]:
    """Return the tables that were left behind.

    Args:
        connection: The connection.
        schemas: The schemas with complete installations of ours.

    Raises:
        Any error of the statement.
    """
    values = {"version_table": VERSION_TABLE, "ours": list(schemas)}
    rows = await connection.execute(_FIND_LEFT_BEHIND, values)
    return tuple(
        LeftBehind(schema, tuple(tables), has_version) for schema, tables, has_version in rows
    )


class Site(NamedTuple):
    """A schema in which `migrate` creates the tables, or finds them."""

    exists: bool
    problem: str | None
    """Why the tables cannot be created there, and what to do; None if they can."""


async def inspect_site(connection: AsyncConnection, schema: str) -> Site:
    """Return whether a schema exists, and what is in the way of our tables in it.

    Raises:
        Any error of a statement.
    """
    row = (await connection.execute(_READ_RIGHTS, {"schema": schema})).one()
    if row.may_create_tables is None:
        problem = (
            f"the role {row.role} may not create the schema {schema}: run CREATE SCHEMA"
            f" {quote(schema)} AUTHORIZATION {quote(row.role)} as the owner of the database"
        )
        return Site(False, None if row.may_create_schema else problem)
    if schema in (await find(connection)).usable:
        return Site(True, None)
    if foreign := await _find_foreign_tables(connection, schema):
        problem = (
            f"the schema {schema} holds {', '.join(foreign)} of another application:"
            " set CHAT_HISTORY_DB_SCHEMA to the name of another schema"
        )
        return Site(True, problem)
    problem = (
        f"the role {row.role} may not create tables in the schema {schema}: run GRANT USAGE, CREATE"
        f" ON SCHEMA {quote(schema)} TO {quote(row.role)} as its owner"
    )
    return Site(True, None if row.may_create_tables else problem)


async def _find_foreign_tables(connection: AsyncConnection, schema: str) -> list[str]:
    """Return the tables in a schema without our tables whose names would be in the way."""
    values = {"schema": schema, "names": [*metadata.tables, VERSION_TABLE]}
    foreign = [str(name) for name in await connection.scalars(_FIND_TABLES, values)]
    if VERSION_TABLE in foreign:
        # Migrating down to nothing leaves the table without a row.
        table = f"{quote(schema)}.{VERSION_TABLE}"
        statement = text(f"SELECT EXISTS (SELECT FROM {table})")  # noqa: S608 - only names
        if not await connection.scalar(statement):
            foreign.remove(VERSION_TABLE)
    return foreign
