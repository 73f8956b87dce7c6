"""Finds the schema that holds our tables: by their columns, and not by `search_path`.

Other applications have tables with the same names, and an `alembic_version` whose revisions are
numbered as ours are. A database of the first release has its tables in `public`, or wherever the
`search_path` of its role put them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.store.db.hot_pool import SchemaStatements, Statement, fetch_in_transaction
from service.store.db.schema_names import quote
from service.store.tables import SCHEMA

SIGNATURE = (
    ("users", "external_id"),
    ("users", "fingerprint"),
    ("users", "revision"),
    ("chat_sessions", "last_seq"),
    ("chat_sessions", "summarized_through_seq"),
    ("chat_sessions", "fingerprint"),
    ("chat_messages", "seq"),
    ("chat_messages", "token_estimate"),
    ("chat_messages", "fingerprint"),
    ("schema_info", "min_build"),
)
"""Columns of the first migration, which no other application's tables have together."""
LOCATE_TIMEOUT_S = 5.0
"""Seconds that the first statement of a connection may take."""

_WANTED = ", ".join(f"('{table}', '{column}')" for table, column in SIGNATURE)
# ASCII only: a database of another encoding rejects other characters.
_LOCATE = f"""
WITH wanted (table_name, column_name) AS (VALUES {_WANTED}), schemas AS (
    SELECT n.nspname::text AS name, has_schema_privilege(n.oid, 'USAGE') AS is_usable
    FROM pg_namespace AS n
    WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
      AND NOT EXISTS (
        SELECT FROM wanted AS w
        WHERE NOT EXISTS (
            SELECT FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
            WHERE c.relnamespace = n.oid AND c.relname = w.table_name AND c.relkind IN ('r', 'p')
              AND a.attname = w.column_name AND NOT a.attisdropped))
)
SELECT current_setting('server_encoding') AS encoding, current_database()::text AS database,
       ARRAY(SELECT s.name FROM schemas AS s WHERE s.is_usable ORDER BY s.name) AS usable,
       ARRAY(SELECT s.name FROM schemas AS s WHERE NOT s.is_usable ORDER BY s.name) AS unusable
"""  # noqa: S608 - only constants are inserted
_LOCATE_STATEMENT = Statement.from_text(_LOCATE)


def encoding_problem(encoding: str, database: str) -> str | None:
    """Return why a database's encoding cannot be used, and what to do; None if it can be."""
    if encoding == "UTF8":
        return None
    return (
        f"the database {database} has the encoding {encoding}, which cannot store every text:"
        f" create one with CREATE DATABASE {quote(f'{database}_utf8')} ENCODING 'UTF8'"
        " LOCALE 'C.UTF-8' TEMPLATE template0, and restore a dump into it"
    )


class UnusableDatabase(ConnectionError):
    """The database cannot be used as it is; the message says why and what to do."""


class Location(NamedTuple):
    """Where a database has our tables."""

    encoding: str
    database: str
    usable: Sequence[str]
    """The schemas with our tables."""
    unusable: Sequence[str]
    """Schemas with our tables that the role may not use."""

    def check_encoding(self) -> None:
        """Check that the database can store every text.

        Raises:
            UnusableDatabase: it cannot.
        """
        if (problem := encoding_problem(self.encoding, self.database)) is not None:
            raise UnusableDatabase(problem)

    def choose(self, configured: str | None, current: str | None = None) -> str:
        """Return the schema to use.

        Args:
            configured: The schema that the configuration names, if any.
            current: The schema that this process has used so far, if any.

        Raises:
            UnusableDatabase: no single schema qualifies.
        """
        if configured is not None:
            if configured in self.unusable:
                raise UnusableDatabase(_missing_usage(configured))
            return configured
        if current in self.usable:
            return str(current)
        if len(self.usable) > 1:
            # Never one of several: it could hold the data of another installation.
            raise UnusableDatabase(
                f"the schemas {', '.join(self.usable)} hold tables of ChatHistory:"
                " set CHAT_HISTORY_DB_SCHEMA to one of them"
            )
        if self.usable:
            return self.usable[0]
        if self.unusable:
            raise UnusableDatabase(_missing_usage(self.unusable[0]))
        return current or SCHEMA


def _missing_usage(schema: str) -> str:
    return (
        f"the role may not use the schema {schema}, which holds the tables: run GRANT USAGE ON"
        f" SCHEMA {quote(schema)} TO the role, as the owner of the schema"
    )


async def find(connection: AsyncConnection) -> Location:
    """Find our tables.

    Raises:
        Any error of the statement.
    """
    return Location(*(await connection.execute(text(_LOCATE))).one())


class SchemaLocator:
    """Finds the schema at the first connection of a database, and puts it into its statements."""

    def __init__(self, configured: str | None) -> None:
        """Take the schema that the configuration names, if any."""
        self.schema: str | None = None
        """The schema in use; None before the first connection."""
        self.statements = SchemaStatements()
        """The statements for the driver."""
        self._refusal: UnusableDatabase | None = None
        self._refused = asyncio.Event()
        self._configured = configured
        # SQLAlchemy reads it at each execution, so that a change applies to open connections too.
        self._translate_map: dict[str | None, str] = {None: SCHEMA}

    def attach(self, engine: AsyncEngine) -> None:
        """Put the schema into the statements of an engine, before any of them is sent."""
        engine.update_execution_options(
            schema_translate_map=self._translate_map, schema_locator=self
        )
        event.listen(engine.sync_engine, "connect", self._on_connect)

    def _on_connect(self, connection: Any, _entry: object) -> None:
        if self.schema is None:
            connection.run_async(self._locate_on)

    async def _locate_on(self, driver: asyncpg.Connection) -> None:
        async with asyncio.timeout(LOCATE_TIMEOUT_S):
            # A transaction pooler could send the parts of a single statement to several servers.
            [row] = await fetch_in_transaction(driver, _LOCATE_STATEMENT)
        self._use(Location(*row))

    async def locate(self, connection: AsyncConnection) -> str:
        """Find the schema again, as tables may be moved below a running service, and return it.

        Raises:
            UnusableDatabase: as `Location.choose`.
            Any error of the statement.
        """
        return self._use(await find(connection))

    async def wait_refused(self) -> UnusableDatabase:
        """Wait until the database has shown that it cannot be used, and return the reason."""
        await self._refused.wait()
        return UnusableDatabase(str(self._refusal))

    def _use(self, location: Location) -> str:
        try:
            location.check_encoding()
            schema = self.schema = location.choose(self._configured, self.schema)
        except UnusableDatabase as error:
            self._refusal = error
            self._refused.set()
            raise
        self._translate_map[None] = schema
        self.statements.use(schema)
        return schema


def locator_of(connection: AsyncConnection) -> SchemaLocator:
    """Return the locator of the engine that has opened a connection."""
    sync_connection = connection.sync_connection
    assert sync_connection is not None  # noqa: S101 - it is open
    locator: SchemaLocator = sync_connection.get_execution_options()["schema_locator"]
    return locator
