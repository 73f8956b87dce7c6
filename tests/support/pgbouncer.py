"""PgBouncer on the loopback interface, in front of a PostgreSQL, in transaction mode.

In this mode each transaction may run on another server connection. Version 1.18, which Debian has,
does not support prepared statements and rejects the start-up parameters that it does not know. It
is configured to require a password (SCRAM), as the poolers of hosting providers do.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sqlalchemy import URL, make_url

from tests.support.account import give_ownership, unprivileged_folder, unprivileged_user
from tests.support.ports import free_port

PROGRAM = "pgbouncer"
PASSWORD = "npg_n0tReallyS3cret"
_SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "scram-sha-256",
    "pool_mode": "transaction",
    "default_pool_size": "20",
    "max_client_conn": "1000",
    "server_login_retry": "1",
    "log_connections": "0",
    "log_disconnections": "0",
}


def find_program() -> str | None:
    """Return the path of PgBouncer or None; Debian's folder is not in the PATH of every user."""
    return shutil.which(PROGRAM) or shutil.which(PROGRAM, path="/usr/sbin:/usr/local/sbin")


class PgBouncer:
    """One PgBouncer, as a context manager; it keeps its address when it is restarted."""

    def __init__(
        self,
        upstream: str,
        settings: dict[str, str] | None = None,
        files: dict[str, bytes] | None = None,
        databases: Sequence[str] = ("*",),
    ) -> None:
        """Configure a pooler for the server of `upstream`, which must be running.

        Args:
            upstream: Connection string of any database of that server, through its socket or by
                TCP. All server connections use its user, and no password.
            settings: Settings by name, which replace or extend those of all tests. `{folder}` in a
                value is replaced by PgBouncer's own folder.
            files: Contents of files to write into that folder, by name.
            databases: Names of the databases that it serves; `*`: all.
        """
        self._upstream = make_url(upstream)
        self._settings = _SETTINGS | (settings or {})
        self._files = files or {}
        self._databases = databases
        self._exit = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.folder = Path()

    @property
    def log(self) -> Path:
        """The path of its log."""
        return self.folder / "pgbouncer.log"

    def url(self, database: str) -> str:
        """Return the connection string of a database through the pooler."""
        url = URL.create(
            "postgresql",
            self._upstream.username or "postgres",
            PASSWORD,
            "127.0.0.1",
            self.port,
            database,
            {"sslmode": "disable", "pgbouncer": "true"},
        )
        return url.render_as_string(hide_password=False)

    def __enter__(self) -> Self:
        self.folder = self._exit.enter_context(unprivileged_folder("pgbouncer"))
        self.port = free_port()
        self._configure()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._exit.close()

    def _configure(self) -> None:
        user = self._upstream.username or "postgres"
        host = self._upstream.query.get("host", self._upstream.host)
        port = self._upstream.query.get("port", self._upstream.port or 5432)
        settings = self._settings | {
            "listen_port": str(self.port),
            "auth_file": "{folder}/users.txt",
        }
        server = f"host={host} port={port} user={user}"
        databases = [f"{name} = {server}" for name in self._databases]
        lines = ["[databases]", *databases, "[pgbouncer]"]
        lines += [
            f"{name} = {value.replace('{folder}', str(self.folder))}"
            for name, value in settings.items()
        ]
        users = f'"{user}" "{PASSWORD}"\n'
        files = {
            "pgbouncer.ini": "\n".join([*lines, ""]).encode(),
            "users.txt": users.encode(),
        } | self._files
        for name, content in files.items():
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_bytes(content)
            give_ownership(path)

    def start(self) -> None:
        """Start the pooler and wait until it listens."""
        program = find_program()
        assert program is not None, "PgBouncer is not installed"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, str(self.folder / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **unprivileged_user(),
            )
        deadline = time.monotonic() + 20
        while True:
            assert self._process.poll() is None, (
                f"PgBouncer does not start:\n{self.log.read_text()}"
            )
            assert time.monotonic() < deadline, (
                f"PgBouncer does not listen:\n{self.log.read_text()}"
            )
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)

    def redirect(self, upstream: str) -> None:
        """Use another server from now on, as the scripts of an operator do after a failover.

        PgBouncer closes its connections to the former server. Databases of `*` do not follow.
        """
        self._upstream = make_url(upstream)
        self._configure()
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """Stop the pooler immediately, even with clients, by SIGTERM; a no-op if it is stopped."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the pooler, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"PgBouncer does not end:\n{self.log.read_text()}") from None
        finally:
            self._process = None
