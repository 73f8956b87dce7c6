"""A real PostgreSQL for one test process.

It has a migrated template, a fresh database for each test, and a log of every statement.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import asyncpg
import psutil

from service.embedded.data_dir import Postmaster, owner, stop_server
from service.embedded.postgres import EmbeddedPostgres
from service.store.db.dsn import parse
from service.store.schema import migrations
from service.store.tables import metadata

TESTS_APPLICATION = "test-support"
"""The application name of the tests' own connections, whose statements are not the service's."""
OWN_SETTINGS = {"application_name": TESTS_APPLICATION, "search_path": "public, chathistory"}
"""Settings of the tests' own connections. Their statements name the service's tables without a
schema, while tables that a test creates are visible to the service."""
_FOLDER = "chat-history-tests-"
_OWNER_PID = "owner.pid"
"""File that holds the id of the process that created a folder. Its PostgreSQL alone does not show
that the folder is in use, since tests stop and restart it."""
_TEMPLATE = "template_chat_history"

# The data need not survive a crash of the machine. PostgreSQL logs every statement that any process
# sends, including those of the driver.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "log_statement": "all",
    "log_parameter_max_length": "0",
    "log_line_prefix": "<%a|%d> ",
}
_LOGGED = re.compile(
    r"^<(?P<application>[^|\n]*)\|(?P<database>[^>\n]*)> LOG:  "
    r"(?:statement|execute [^:\n]+): (?P<sql>.*(?:\n\t.*)*)",
    re.MULTILINE,
)
_SCHEMA = re.compile(
    rf"""(?:\b(?:chat\w*|public)|"chat[^"]*")\.(?=(?:{"|".join(metadata.tables)})\b)"""
)
"""The schema before the name of a table. The schemas of the tests begin with `chat`."""


_COUNT_BUSY = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'chat-history' AND state <> 'idle'
"""


class LoggedStatement(NamedTuple):
    """One statement that PostgreSQL received."""

    application: str
    database: str
    sql: str


class Cluster:
    """A PostgreSQL server for tests, as a context manager."""

    running: ClassVar[list[Cluster]] = []
    """The running clusters of this process."""
    unchecked: ClassVar[list[LoggedStatement]] = []
    """Statements of stopped clusters that no call of `all_new_statements` has returned yet."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """Add `settings`, by name, to those of all tests; none of them may need a restart."""
        self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        (self.folder / _OWNER_PID).write_text(str(os.getpid()))
        self.postgres = EmbeddedPostgres(self.folder, "tests")
        self._settings = _SETTINGS | dict(settings or {})
        self._numbers = itertools.count(1)
        self._log_offset = 0

    def __enter__(self) -> Self:
        self.folder.chmod(0o711)
        self.postgres.start()
        Cluster.running.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.postgres.stop()
        with suppress(ValueError):
            Cluster.running.remove(self)
        Cluster.unchecked += self.new_statements()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self.postgres.pid is not None, "not started"
        return self.postgres.pid

    @property
    def pgdata(self) -> Path:
        """The data directory, which also holds the socket."""
        return self.postgres.pgdata

    def url(self, database: str) -> str:
        """Return the connection string of a database."""
        return self.postgres.url.replace("/postgres?", f"/{database}?", 1)

    async def prepare(self) -> None:
        """Configure the server and migrate the template of the tests' databases."""
        connection = await self.connect()
        try:
            for name, value in self._settings.items():
                await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            await connection.execute("SELECT pg_reload_conf()")
            # Tests read in the log what PostgreSQL says about an error. The embedded server's own
            # setting, which is on its command line, hides that.
            await connection.execute("ALTER ROLE postgres SET log_error_verbosity = 'default'")
            await connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        finally:
            await connection.close()
        # The migration opens a new connection, to which the new settings apply.
        await migrations.upgrade(parse(self.url(_TEMPLATE)))

    async def set_durable(self, *, is_durable: bool) -> None:
        """Turn `fsync` and `full_page_writes` on, as the server of an operator has them, or off."""
        value = "on" if is_durable else "off"
        async with connected_to(self.url("postgres")) as connection:
            for name in ("fsync", "full_page_writes"):
                await connection.execute(f"ALTER SYSTEM SET {name} = {value}")
            await connection.execute("SELECT pg_reload_conf()")
        while (await fetch(self.url("postgres"), "SHOW fsync"))[0][0] != value:
            await asyncio.sleep(0.01)

    async def connect(self, database: str = "postgres") -> asyncpg.Connection:
        """Open a connection for a test's own statements."""
        return await asyncpg.connect(
            self.url(database),
            server_settings=OWN_SETTINGS,
            statement_cache_size=0,
        )

    async def create_database(self, *, empty: bool = False) -> str:
        """Create a database, migrated unless `empty`, and return its name."""
        name = f"test_{next(self._numbers)}"
        template = "template0" if empty else _TEMPLATE
        connection = await self.connect()
        try:
            # Copying the files is faster than writing them to the log, since fsync is off.
            await connection.execute(
                f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy"
            )
        finally:
            await connection.close()
        return name

    async def drop_database(self, name: str) -> None:
        """Drop a database and close all connections to it."""
        connection = await self.connect()
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        finally:
            await connection.close()

    def new_statements(self) -> list[LoggedStatement]:
        """Return the statements of all processes since the last call, except the tests' own.

        PostgreSQL logs a statement before it runs it, so every answered statement is included.
        """
        with self.postgres.log.open("rb") as log:
            log.seek(self._log_offset)
            raw = log.read()
        # An incomplete last line is left for the next call.
        raw = raw[: raw.rfind(b"\n") + 1]
        self._log_offset += len(raw)
        return list(statements_in(raw.decode(errors="replace")))


def all_new_statements() -> list[LoggedStatement]:
    """Return the new statements of all clusters of this process, except the tests' own."""
    statements, Cluster.unchecked = Cluster.unchecked, []
    for cluster in Cluster.running:
        statements += cluster.new_statements()
    return statements


def statements_in(log: str) -> Iterator[LoggedStatement]:
    """Yield the statements in a log of PostgreSQL, except the tests' own, without schemas."""
    for match in _LOGGED.finditer(log):
        if match["application"] != TESTS_APPLICATION:
            sql = _SCHEMA.sub("", match["sql"].replace("\n\t", "\n"))
            yield LoggedStatement(match["application"], match["database"], sql)


def remove_abandoned_clusters() -> None:
    """Stop the servers and remove the folders of test processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        if not (folder / "lock").exists() or owner(folder) is not None:
            continue  # In use, or being created.
        owner_pid = folder / _OWNER_PID
        if owner_pid.exists() and psutil.pid_exists(int(owner_pid.read_text() or 0)):
            continue
        server = Postmaster.read(folder / "postgres")
        if server is not None and server.is_alive():
            with suppress(ProcessLookupError):
                stop_server(server.pid)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def connected_to(url: str) -> AsyncGenerator[asyncpg.Connection]:
    """Open a connection to a database for a test's own statements."""
    connection = await asyncpg.connect(url, server_settings=OWN_SETTINGS, statement_cache_size=0)
    try:
        yield connection
    finally:
        await connection.close()


async def fetch(url: str, sql: str, *args: Any) -> list[asyncpg.Record]:
    """Run one of a test's own statements on a database and return its rows."""
    async with connected_to(url) as connection:
        return await connection.fetch(sql, *args)


async def execute(url: str, sql: str) -> None:
    """Run several of a test's own statements, without arguments."""
    async with connected_to(url) as connection:
        await connection.execute(sql)


async def tables_in(url: str, schema: str) -> set[str]:
    """Return the names of the tables in a schema."""
    rows = await fetch(url, "SELECT tablename FROM pg_tables WHERE schemaname = $1", schema)
    return {row["tablename"] for row in rows}


async def wait_until_idle(url: str) -> None:
    """Wait until no backend runs a statement of the service, whether or not its client is alive."""
    async with asyncio.timeout(60), connected_to(url) as connection:
        while await connection.fetchval(_COUNT_BUSY):
            await asyncio.sleep(0.01)
