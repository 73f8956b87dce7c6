"""Puts the schema of an installation into statements, whose texts name the default one.

No statement depends on `search_path`, which a transaction pooler neither takes at the start of a
connection nor keeps between transactions.
"""

from __future__ import annotations

from sqlalchemy.dialects.postgresql import asyncpg as dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.tables import SCHEMA

_PREPARER = dialect.dialect().identifier_preparer  # type: ignore[no-untyped-call]


def quote(schema: str) -> str:
    """Return the name of a schema as an SQL identifier, in quotes if it needs them."""
    return str(_PREPARER.quote_schema(schema))


def in_schema(sql: str, schema: str) -> str:
    """Return a statement with its tables in a schema.

    Args:
        sql: The statement, in which every table is written as `chathistory.name`.
        schema: The name of the schema, without quotes.
    """
    return sql if schema == SCHEMA else sql.replace(f"{SCHEMA}.", f"{quote(schema)}.")


def schema_of(connection: AsyncConnection) -> str:
    """Return the schema of the statements that SQLAlchemy runs on a connection."""
    sync_connection = connection.sync_connection
    assert sync_connection is not None  # noqa: S101 - it is open
    return str(sync_connection.get_execution_options()["schema_translate_map"][None])
