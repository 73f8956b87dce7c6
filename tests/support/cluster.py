"""A real PostgreSQL for one test process: a migrated template, a fresh database for each test, and a log of every statement."""

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

TESTS_APPLICATION = "test-support"
"""The application name of what the tests themselves ask; such statements are not the service's."""
_FOLDER = "chat-history-tests-"
_MAKER = "maker"
"""Names the process that made a folder: it may have stopped its PostgreSQL for a moment only."""
_TEMPLATE = "template_chat_history"

# Tests outlive no crash of the machine; PostgreSQL itself writes down every statement that any process sends, driver-level ones too.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "log_statement": "all",
    "log_parameter_max_length": "0",
    "log_line_prefix": "<%a|%d> ",
}
_LOGGED = re.compile(
    r"^<(?P<who>[^|\n]*)\|(?P<database>[^>\n]*)> LOG:  (?:statement|execute [^:\n]+): (?P<sql>.*(?:\n\t.*)*)",
    re.MULTILINE,
)


_AT_WORK = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'chat-history' AND state <> 'idle'
"""


class LoggedStatement(NamedTuple):
    """One statement that PostgreSQL was sent."""

    who: str
    database: str
    sql: str


class Cluster:
    """A PostgreSQL server of our own, as a context manager."""

    running: ClassVar[list[Cluster]] = []
    """Those of this process."""
    left: ClassVar[list[LoggedStatement]] = []
    """What was sent to those that have ended, and nobody has looked at."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """Take settings, by name, beside those that all tests use; only such as need no restart."""
        self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        (self.folder / _MAKER).write_text(str(os.getpid()))
        self.postgres = EmbeddedPostgres(self.folder, "tests")
        self._settings = _SETTINGS | dict(settings or {})
        self._numbers = itertools.count(1)
        self._read = 0

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
        Cluster.left += self.new_statements()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self.postgres.pid is not None, "not started"
        return self.postgres.pid

    @property
    def pgdata(self) -> Path:
        """The folder of its data, where its socket is too."""
        return self.postgres.pgdata

    def url(self, database: str) -> str:
        """Return the connection string of a database."""
        return self.postgres.url.replace("/postgres?", f"/{database}?", 1)

    async def prepare(self) -> None:
        """Set the server up for tests and migrate the template that every test's database is made of."""
        connection = await self.connect()
        try:
            for name, value in self._settings.items():
                await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        finally:
            await connection.close()
        # A new connection, so that the new settings hold also for the migration.
        await migrations.upgrade(parse(self.url(_TEMPLATE)))

    async def connect(self, database: str = "postgres") -> asyncpg.Connection:
        """Open a connection of the tests' own."""
        return await asyncpg.connect(
            self.url(database),
            server_settings={"application_name": TESTS_APPLICATION},
            statement_cache_size=0,
        )

    async def create_database(self, *, empty: bool = False) -> str:
        """Make a fresh database, migrated unless `empty`, and return its name."""
        name = f"test_{next(self._numbers)}"
        template = "template0" if empty else _TEMPLATE
        connection = await self.connect()
        try:
            # By copying files: faster than through the log, where nothing is synced.
            await connection.execute(
                f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy"
            )
        finally:
            await connection.close()
        return name

    async def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected."""
        connection = await self.connect()
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        finally:
            await connection.close()

    def new_statements(self) -> list[LoggedStatement]:
        """Return what was sent since the last call, by whatever process, but for the tests' own statements.

        PostgreSQL writes a statement down before it runs it, so whatever has been answered is here.
        """
        with self.postgres.log.open("rb") as log:
            log.seek(self._read)
            raw = log.read()
        # A line that is being written is left for the next time.
        raw = raw[: raw.rfind(b"\n") + 1]
        self._read += len(raw)
        return list(statements_in(raw.decode(errors="replace")))


def all_new_statements() -> list[LoggedStatement]:
    """Return what was sent to any cluster of this process since the last call, but for the tests' own statements."""
    left, Cluster.left = Cluster.left, []
    return left + [
        statement for cluster in Cluster.running for statement in cluster.new_statements()
    ]


def statements_in(log: str) -> Iterator[LoggedStatement]:
    """Find the statements in a log of PostgreSQL, but for the tests' own."""
    for found in _LOGGED.finditer(log):
        if found["who"] != TESTS_APPLICATION:
            yield LoggedStatement(
                found["who"], found["database"], found["sql"].replace("\n\t", "\n")
            )


def remove_abandoned_clusters() -> None:
    """Remove what test processes have left that could not end in good order."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        if not (folder / "lock").exists() or owner(folder) is not None:
            continue  # Somebody's who runs, or is just starting.
        maker = folder / _MAKER
        if maker.exists() and psutil.pid_exists(int(maker.read_text() or 0)):
            continue
        server = Postmaster.read(folder / "postgres")
        if server is not None and server.is_alive():
            with suppress(ProcessLookupError):
                stop_server(server.pid)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def connected_to(url: str) -> AsyncGenerator[asyncpg.Connection]:
    """Open a connection to a database, as the tests themselves."""
    connection = await asyncpg.connect(
        url, server_settings={"application_name": TESTS_APPLICATION}, statement_cache_size=0
    )
    try:
        yield connection
    finally:
        await connection.close()


async def fetch(url: str, sql: str, *args: Any) -> list[asyncpg.Record]:
    """Ask a database, as the tests themselves."""
    async with connected_to(url) as connection:
        return await connection.fetch(sql, *args)


async def wait_until_idle(url: str) -> None:
    """Wait until none of the service's sessions is at work in a database, such whose clients are gone included."""
    async with asyncio.timeout(60), connected_to(url) as connection:
        while await connection.fetchval(_AT_WORK):
            await asyncio.sleep(0.01)
