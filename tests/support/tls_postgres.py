"""Debian's PostgreSQL on TCP, configured as Neon is: TLS and a password (SCRAM) are required."""

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
    """Return the folder, which is not in PATH, of the newest PostgreSQL that Debian installed."""
    folders = [path.parent for path in _DEBIAN.glob("*/bin/initdb")]
    return max(
        folders,
        key=lambda folder: int(re.sub(r"\D", "", folder.parent.name) or 0),
        default=None,
    )


class TlsPostgres:
    """A PostgreSQL server in a folder of its own, as a context manager.

    The clusters that Debian manages on the machine are not touched.
    """

    def __init__(
        self, certificate: CertificatePair, *, client_ca: bytes | None = None, hba: str = _HBA
    ) -> None:
        """Configure a server.

        Args:
            certificate: The certificate of the server.
            client_ca: The authority that must have issued certificates of clients, if they have
                any.
            hba: The content of `pg_hba.conf`.
        """
        self._certificate = certificate
        self._client_ca = client_ca
        self._hba = hba
        self._exit = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path()
        self.port = 0

    def url(self, host: str = "127.0.0.1", **query: str) -> str:
        """Return the connection string for TCP."""
        return URL.create(
            "postgresql", USER, PASSWORD, host, self.port, DATABASE, query
        ).render_as_string(hide_password=False)

    @property
    def local_url(self) -> str:
        """The connection string for the socket, which needs no password, for tests' statements."""
        return f"postgresql://{USER}@/{DATABASE}?host={self.folder}&port={self.port}"

    def trust(self, client_ca: bytes) -> None:
        """Trust another authority of clients, once the configuration is reloaded."""
        self._write("client_ca.crt", client_ca)

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
        programs = find_programs()
        assert programs is not None, "Debian's postgresql is not installed"
        self._write("password", PASSWORD.encode())
        data = self.folder / "data"
        subprocess.run(
            [
                programs / "initdb",
                f"--pgdata={data}",
                f"--username={USER}",
                f"--pwfile={self.folder / 'password'}",
                "--no-sync",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
            ],
            check=True,
            capture_output=True,
            cwd="/",
            **unprivileged_user(),
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "ssl": "on",
            "ssl_cert_file": str(self._write("tls.crt", self._certificate.cert)),
            "ssl_key_file": str(self._write("tls.key", self._certificate.key)),
            "hba_file": str(self._write("pg_hba.conf", self._hba.encode())),
        }
        if self._client_ca is not None:
            settings["ssl_ca_file"] = str(self._write("client_ca.crt", self._client_ca))
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    programs / "postgres",
                    "-D",
                    data,
                    *(f"--{name}={value}" for name, value in settings.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **unprivileged_user(),
            )
        deadline = time.monotonic() + 30
        create: list[str | Path] = [
            programs / "createdb",
            f"--host={self.folder}",
            f"--port={self.port}",
            f"--username={USER}",
            DATABASE,
        ]
        while subprocess.run(create, check=False, capture_output=True).returncode != 0:
            log_text = (self.folder / "log").read_text()
            assert self._process.poll() is None, f"PostgreSQL does not start:\n{log_text}"
            assert time.monotonic() < deadline, f"PostgreSQL does not answer:\n{log_text}"
            time.sleep(0.05)

    def _stop(self) -> None:
        if self._process is not None:
            # SIGINT does not wait for clients to disconnect, as SIGTERM would.
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        self._exit.close()

    def _write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        give_ownership(path)
        return path
