"""The version of a database's schema, and whether this build works with it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import tables
from service.store.db.schema_names import quote
from service.store.schema.location import locator_of

VERSION_TABLE = "alembic_version"
"""The table of the revision, in the schema of our tables: no other Alembic uses it there."""


class SchemaVersion:
    """Version of a schema, as stored in the database.

    Args:
        revision: Its migration; 0 when there is no schema.
        min_build: The oldest build that works with it.
    """

    __slots__ = ("min_build", "revision")

    def __init__(self, revision: int, min_build: int) -> None:
        self.revision = revision
        self.min_build = min_build

    @property
    def problem(self) -> str | None:
        """Why this build cannot use the schema, and what to do about it; None if it can."""
        if self.revision < tables.REQUIRED_REVISION:
            return (
                f"the schema is at revision {self.revision:04d} and this build needs"
                f" {tables.REQUIRED_REVISION:04d}: run `chat-history migrate`"
            )
        if self.min_build > tables.BUILD:
            return (
                f"the schema needs build {self.min_build} or newer, and this is build"
                f" {tables.BUILD}: deploy a newer one"
            )
        return None


async def schema_version(connection: AsyncConnection, schema: str | None = None) -> SchemaVersion:
    """Read the version of a schema; revision 0 and build 0 when it has no tables.

    Args:
        connection: The connection.
        schema: The name of the schema. None finds it again, as tables may be moved below a running
            service: the connection is one of a `Database`.

    Raises:
        UnusableDatabase: the schema is not found, since there are several.
    """
    if schema is None:
        schema = await locator_of(connection).locate(connection)
    version_table = f"{quote(schema)}.{VERSION_TABLE}"
    info_table = f"{quote(schema)}.{tables.schema_info.name}"
    has_schema = await connection.scalar(
        text("SELECT to_regclass(:version) IS NOT NULL AND to_regclass(:info) IS NOT NULL"),
        {"version": version_table, "info": info_table},
    )
    if not has_schema:
        return SchemaVersion(0, 0)
    versions = (
        f"SELECT (SELECT version_num FROM {version_table}),"  # noqa: S608 - only names
        f" (SELECT min_build FROM {info_table})"
    )
    row: Any = (await connection.exec_driver_sql(versions)).one()
    return SchemaVersion(int(row[0] or 0), int(row[1] or 0))
