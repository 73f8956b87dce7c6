"""A data folder: whose it is now, and what runs on it.

One process at a time owns a folder. It holds a lock on the file `lock`, which the system takes away when the process ends, however
that happens; the file says who it is.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import quote

STOP_TIMEOUT = 30.0
"""Seconds that an orderly stop may take, before PostgreSQL is told to drop everything (and replay its log at the next start)."""


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the text says why and what to do."""


class AlreadyRunning(EmbeddedError):
    """Another process owns the data folder."""


class Owner(NamedTuple):
    """The process that owns a data folder, and what it says it does there."""

    pid: int
    listen: str


class Lock:
    """A lock that the system takes away when its holder ends; the file says who that is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self, owner: Owner) -> None:
        """Take the lock.

        Raises:
            AlreadyRunning: another process has it.
            OSError: the file cannot be made.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise AlreadyRunning(_say_who(self.path)) from None
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.write(owner)

    def write(self, owner: Owner) -> None:
        """Say who has it; does nothing when it is not ours."""
        if self._fd is not None:
            text = f"{owner.pid}\n{owner.listen}\n".encode()
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def release(self) -> None:
        """Give it free. The file stays: removing it would let two processes lock two files of one name."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None


class Postmaster(NamedTuple):
    """What PostgreSQL's own file says of the server on a data folder."""

    pid: int
    pgdata: str
    socket_dir: Path
    status: str

    @classmethod
    def read(cls, pgdata: Path) -> Self | None:
        """Read the file; None when there is none, or it is not complete yet."""
        try:
            lines = (pgdata / "postmaster.pid").read_text().splitlines()
            return cls(int(lines[0]), lines[1], Path(lines[4]), lines[7].strip())
        except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
            return None

    def is_alive(self) -> bool:
        """Whether the process with this number is this server, and not one that has got the number since."""
        return is_postgres(self.pid) and self.pgdata in _process(self.pid)[1]


def running_url(data_dir: Path) -> str | None:
    """Return the connection string of the server that runs on a data folder, whoever started it; None when none does.

    Raises:
        EmbeddedError: the folder is somebody else's.
    """
    pgdata = data_dir.expanduser().resolve() / "postgres"
    try:
        server = Postmaster.read(pgdata)
    except PermissionError:
        raise EmbeddedError(
            f"the data in {pgdata} belongs to another user: run as that user"
        ) from None
    if server is None or server.status != "ready" or not server.is_alive():
        return None
    return socket_url(server.socket_dir)


def owner(data_dir: Path) -> Owner | None:
    """Return the process that owns a data folder, going by what its lock says; takes no lock."""
    try:
        pid, listen = (data_dir.expanduser().resolve() / "lock").read_text().splitlines()[:2]
        found = Owner(int(pid), listen)
    except (OSError, ValueError):
        return None
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # Another user's.
    return found


def _say_who(lock: Path) -> str:
    for _ in range(20):
        # Empty for the instant between taking the lock and writing.
        if (holder := owner(lock.parent)) is not None:
            return f"ChatHistory is already running (process {holder.pid}, listening on {holder.listen}) on this data folder: {lock.parent}"
        time.sleep(0.05)
    return f"ChatHistory is already running on this data folder: {lock.parent}"


def socket_url(socket_dir: Path) -> str:
    """Return the connection string of the server whose socket is in a folder."""
    return f"postgresql://postgres@/postgres?host={quote(str(socket_dir), safe='/')}"


def end_server(pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
    """Stop a server: it rolls back what is under way and writes everything out; when that takes too long, without ceremony."""
    for order, patience in (
        (signal.SIGINT, STOP_TIMEOUT),
        (signal.SIGQUIT, 5.0),
        (signal.SIGKILL, 5.0),
    ):
        with suppress(ProcessLookupError):
            os.kill(pid, order)
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            if (child is None and not is_postgres(pid)) or (
                child is not None and child.poll() is not None
            ):
                return
            time.sleep(0.01)


def is_postgres(pid: int) -> bool:
    """Whether a process with this number lives and is PostgreSQL."""
    return Path(_process(pid)[0]).name.startswith("postgres")


def _process(pid: int) -> tuple[str, str]:
    """Return a process's program and its command line; empty when there is none, or it has ended and waits to be noticed."""
    if Path("/proc/self").exists():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            line = ""
        return line.split("\0", 1)[0], line
    program, line = (
        subprocess.run(  # noqa: S603
            ["/bin/ps", "-p", str(pid), "-o", what], check=False, capture_output=True, text=True
        ).stdout.strip()
        for what in ("comm=", "command=")
    )
    return program, line
