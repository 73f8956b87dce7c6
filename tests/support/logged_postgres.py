"""PostgreSQL servers with the default settings of a log, to be read by tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from shutil import rmtree

import asyncpg

from service.embedded.postgres import EmbeddedPostgres
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.support import tls_postgres
from tests.support.certificates import CertificateAuthority
from tests.support.cluster import OWN_SETTINGS
from tests.support.tls_postgres import TlsPostgres
from tests.support.tools import skip_or_fail

ROLE = "app"
DATABASE = "app"
KINDS = ("embedded", "debian")


class LoggedPostgres:
    """A server, its log, and a database whose owner is an ordinary role."""

    def __init__(self, admin_url: str, log: Path) -> None:
        """Take a running server.

        Args:
            admin_url: Connection string of a superuser, through the socket.
            log: The file that the server writes its log to.
        """
        self.admin_url = admin_url
        self._log = log
        self.url = f"postgresql://{ROLE}@/{DATABASE}?{admin_url.partition('?')[2]}"
        """Connection string of the database, as a role without the rights of a superuser."""

    async def prepare(self) -> None:
        """Create the role and the database, and migrate it."""
        connection = await self._connect(self.admin_url)
        try:
            await connection.execute(f"CREATE ROLE {ROLE} LOGIN NOSUPERUSER")
            await connection.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
            # The embedded server's own setting hides more than other servers do.
            await connection.execute(
                f"ALTER DATABASE {DATABASE} SET log_error_verbosity = 'default'"
            )
        finally:
            await connection.close()
        await migrations.upgrade(parse(self.url))

    def log_bytes(self) -> int:
        """Return the size of the server's log."""
        return self._log.stat().st_size

    def read_log(self, start: int = 0) -> str:
        """Return what the server has logged from byte `start` on."""
        return self._log.read_bytes()[start:].decode(errors="replace")

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[asyncpg.Connection]:
        """Open a connection of the ordinary role for a test's own statements."""
        connection = await self._connect(self.url)
        try:
            yield connection
        finally:
            await connection.close()

    @staticmethod
    async def _connect(url: str) -> asyncpg.Connection:
        return await asyncpg.connect(url, server_settings=OWN_SETTINGS, statement_cache_size=0)


@contextmanager
def logged_postgres(kind: str) -> Generator[LoggedPostgres]:
    """Run the embedded server or Debian's (`KINDS`), whose settings of the log are unchanged."""
    if kind == "debian":
        if tls_postgres.find_programs() is None:
            skip_or_fail("Debian's postgresql is not installed")
        with TlsPostgres(CertificateAuthority().issue()) as postgres:
            yield LoggedPostgres(postgres.local_url, postgres.folder / "log")
        return
    folder = Path(tempfile.mkdtemp(prefix="chat-history-logged-")).resolve()
    folder.chmod(0o711)
    embedded = EmbeddedPostgres(folder, "tests")
    try:
        yield LoggedPostgres(embedded.start(), embedded.log)
    finally:
        embedded.stop()
        rmtree(folder, ignore_errors=True)
