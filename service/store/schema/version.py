"""The version of a database's schema, and whether this build works with it."""

from __future__ import annotations

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import tables


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


async def schema_version(connection: AsyncConnection) -> SchemaVersion:
    """Read the version of the schema; revision 0 and build 0 when there is no schema."""
    has_schema = await connection.scalar(
        text(
            "SELECT to_regclass('alembic_version') IS NOT NULL"
            " AND to_regclass('schema_info') IS NOT NULL"
        )
    )
    if not has_schema:
        return SchemaVersion(0, 0)
    revision = select(text("version_num")).select_from(text("alembic_version")).scalar_subquery()
    min_build = select(tables.schema_info.c.min_build).scalar_subquery()
    row = (await connection.execute(select(revision, min_build))).one()
    return SchemaVersion(int(row[0] or 0), int(row[1] or 0))
