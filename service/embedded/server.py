"""One PostgreSQL server process: its settings, its start, its log and its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from service.embedded.data_dir import EmbeddedError, Postmaster, stop_server
from service.embedded.failures import explain, explain_panic
from service.embedded.os_account import Account, identity
from service.embedded.programs import environment
from service.embedded.socket_dir import choose_socket_dir

START_TIMEOUT_S = 300.0
"""Seconds in which a started server must become ready. After a crash it first replays its log."""
SHARED_MEMORY_TIMEOUT_S = 10.0
"""Seconds to wait for the processes of a crashed server to release their shared memory."""

SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "cluster_name": "chat-history",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "jit": "off",
    # Neither rows nor values of parameters are logged, also when a statement has a defect. Terse
    # omits the lines DETAIL, HINT and CONTEXT.
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}
_MAX_LOG_BYTES = 8 * 1024 * 1024
_LAST_LOG_BYTES = 64 * 1024
"""Bytes at the end of the log that are searched for the reason of an unexpected end."""


class Server:
    """A PostgreSQL server on the folder of a database, which is started as a child process."""

    def __init__(
        self,
        bin_dir: Path,
        pgdata: Path,
        log: Path,
        account: Account | None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Choose a folder for the socket without starting the server.

        Args:
            bin_dir: The folder of PostgreSQL's programs.
            pgdata: The folder of the database.
            log: The file to which the server appends its log.
            account: The account that runs the server, if this process is root.
            settings: Settings in addition to `SETTINGS`.
        """
        self.bin_dir = bin_dir
        self.pgdata = pgdata
        self.log = log
        self.socket_dir = choose_socket_dir(pgdata, account)
        self._account = account
        self._settings = {
            **SETTINGS,
            **(settings or {}),
            "unix_socket_directories": str(self.socket_dir),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs, else None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it accepts connections.

        Raises:
            EmbeddedError: It ends, or is not ready within START_TIMEOUT_S.
        """
        command = [
            str(self.bin_dir / "postgres"),
            "-D",
            str(self.pgdata),
            *(f"--{name}={value}" for name, value in self._settings.items()),
        ]
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.old"))
        deadline = time.monotonic() + SHARED_MEMORY_TIMEOUT_S
        while True:
            earlier_bytes = self.log.stat().st_size if self.log.exists() else 0
            self._process = self._spawn(command)
            if self._wait_until_ready(self._process):
                return
            output = self.log.read_bytes()[earlier_bytes:].decode(errors="replace")
            # After a crash, child processes of the old server hold its shared memory for a moment.
            # They write to the same log, so the message need not be among the last lines.
            if "shared memory block" not in output or time.monotonic() > deadline:
                reason = explain(
                    output, self.pgdata, log=self.log, free_bytes=self._free_disk_bytes()
                )
                raise EmbeddedError(f"the embedded PostgreSQL cannot start: {reason}")
            time.sleep(0.2)

    def wait(self) -> int:
        """Wait for the end of the started server and return its exit code."""
        assert self._process is not None, "not started"  # noqa: S101
        return self._process.wait()

    def explain_end(self) -> str:
        """Return why the server ended unexpectedly, in one line; empty when its log has no PANIC.

        Raises:
            OSError: The log cannot be read.
        """
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _LAST_LOG_BYTES))
            output = log.read().decode(errors="replace")
        # An earlier PANIC had another reason.
        _, _, output = output.rpartition("database system is ready to accept connections")
        return explain_panic(output, self.pgdata, log=self.log, free_bytes=self._free_disk_bytes())

    def stop(self) -> None:
        """Shut the server down. Does nothing when it does not run."""
        process = self._process
        if process is not None and process.poll() is None:
            stop_server(process.pid, process)

    def close(self) -> None:
        """Shut the server down, and delete the folder of its socket if that is a temporary one."""
        self.stop()
        if self.socket_dir != self.pgdata:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start PostgreSQL in a process session of its own, with its output in the log file."""
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            return subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment(),
                start_new_session=True,
                **identity(self._account),
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until PostgreSQL accepts connections; return False when it ended instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None:
            server = Postmaster.read(self.pgdata)
            if server is not None and server.pid == process.pid and server.status == "ready":
                return True
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"the embedded PostgreSQL is not ready after {START_TIMEOUT_S:.0f} seconds; "
                    f"see {self.log}"
                )
            time.sleep(0.01)
        return False

    def _free_disk_bytes(self) -> int:
        return shutil.disk_usage(self.pgdata.parent).free
