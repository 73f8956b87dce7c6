"""Debian's PostgreSQL on TCP as Neon has it: TLS with a certificate, a password (SCRAM), and nothing without the two."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sqlalchemy import URL

from tests.support.account import give_ownership, unprivileged_folder, unprivileged_user
from tests.support.certificates import CertificatePair
from tests.support.ports import free_port

USER = "neondb_owner"
DATABASE = "neondb"
PASSWORD = "npg_n0tReallyS3cret"
_DEBIAN = Path("/usr/lib/postgresql")
_HBA = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"


def find_programs() -> Path | None:
    """Return the folder of the system's PostgreSQL programs, the newest's, which is not in PATH."""
    found = [path.parent for path in _DEBIAN.glob("*/bin/initdb")]
    return max(found, key=lambda each: int(re.sub(r"\D", "", each.parent.name) or 0), default=None)


class TlsPostgres:
    """A PostgreSQL server of our own, as a context manager; nothing of the machine's own clusters is touched."""

    def __init__(self, certificate: CertificatePair) -> None:
        self._certificate = certificate
        self._exit = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path()
        self.port = 0

    def url(self, host: str = "127.0.0.1", **query: str) -> str:
        """Return the connection string by way of TCP."""
        return URL.create(
            "postgresql", USER, PASSWORD, host, self.port, DATABASE, query
        ).render_as_string(hide_password=False)

    @property
    def local_url(self) -> str:
        """The connection string by way of the socket, which asks nobody for a password: for the tests' own questions."""
        return f"postgresql://{USER}@/{DATABASE}?host={self.folder}&port={self.port}"

    def __enter__(self) -> Self:
        self.folder = self._exit.enter_context(unprivileged_folder("postgres"))
        self.port = free_port()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        found = find_programs()
        assert found is not None, "Debian's postgresql is not installed"
        self._write("password", PASSWORD.encode())
        data = self.folder / "data"
        subprocess.run(
            [found / "initdb", "--pgdata", data, "--username", USER, "--pwfile", self.folder / "password", "--no-sync",
             "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"],
            check=True, capture_output=True, cwd="/", **unprivileged_user(),
        )  # fmt: skip
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "ssl": "on",
            "ssl_cert_file": str(self._write("tls.crt", self._certificate.cert)),
            "ssl_key_file": str(self._write("tls.key", self._certificate.key)),
            "hba_file": str(self._write("pg_hba.conf", _HBA.encode())),
            "fsync": "off",
        }
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [found / "postgres", "-D", data, *(f"--{name}={value}" for name, value in settings.items())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", **unprivileged_user(),
            )  # fmt: skip
        give_up = time.monotonic() + 30
        create: list[str | Path] = [
            found / "createdb",
            "--host",
            self.folder,
            "--port",
            str(self.port),
            "--username",
            USER,
            DATABASE,
        ]
        while subprocess.run(create, check=False, capture_output=True).returncode != 0:
            log_text = (self.folder / "log").read_text()
            assert self._process.poll() is None, f"PostgreSQL does not start:\n{log_text}"
            assert time.monotonic() < give_up, f"PostgreSQL does not answer:\n{log_text}"
            time.sleep(0.05)

    def _stop(self) -> None:
        if self._process is not None:
            # Without waiting for those who are connected, as SIGTERM would.
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        self._exit.close()

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        give_ownership(path)
        return path
