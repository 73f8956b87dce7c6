"""Finds the privileges on our tables that a role lacks."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.hot_pool import Statement, fetch_on
from service.store.db.schema_names import quote, schema_of
from service.store.schema.version import VERSION_TABLE
from service.store.tables import metadata, schema_info

_TABLES = sorted([*metadata.tables, VERSION_TABLE])
_READ_TABLES = [schema_info.name, VERSION_TABLE]
"""Tables that the service only reads."""
# A table that does not exist is not reported: the version of the schema shows that.
_FIND_MISSING = Statement.from_text("""
SELECT t.name AS table_name, p.name AS privilege
FROM unnest($1::text[]) AS t (name),
     unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p (name)
WHERE NOT has_table_privilege(to_regclass('chathistory.' || t.name), p.name)
  AND (p.name = 'SELECT' OR t.name <> ALL($2::text[]))
ORDER BY p.name <> 'SELECT', t.name, p.name
""")


class MissingPrivilege(NamedTuple):
    """A privilege on a table that the role lacks."""

    schema: str
    table_name: str
    privilege: str

    def __str__(self) -> str:
        return f"the role lacks {self.privilege} on {quote(self.schema)}.{self.table_name}"


async def find_missing_privileges(connection: AsyncConnection) -> list[MissingPrivilege]:
    """Return the privileges on the tables in use that the role of a connection lacks.

    Args:
        connection: Its option `schema_translate_map` names the schema of the tables. A transaction
            has begun on it.

    Returns:
        The privileges, those to read first.

    Raises:
        Any error of the driver: 42501 if the role may not use the schema itself.
    """
    rows = await fetch_on(connection, _FIND_MISSING, _TABLES, _READ_TABLES)
    schema = schema_of(connection)
    return [MissingPrivilege(schema, table_name, privilege) for table_name, privilege in rows]
