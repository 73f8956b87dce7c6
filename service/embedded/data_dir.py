"""The data folder: which process owns it, and which PostgreSQL server runs on it.

One process at a time owns a folder. The owner holds a lock on the file `lock`, which the kernel
releases when the process ends for any reason. The file's content identifies the owner.
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

FAST_SHUTDOWN_TIMEOUT_S = 30.0
"""Seconds that a fast shutdown of PostgreSQL may take before an immediate shutdown is requested.

After an immediate shutdown the next start replays the write-ahead log.
"""
IMMEDIATE_SHUTDOWN_TIMEOUT_S = 5.0


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used. The message states the cause and what to do."""


class AlreadyRunning(EmbeddedError):
    """Another process owns the data folder."""


class Owner(NamedTuple):
    """The process that owns a data folder."""

    pid: int
    listen: str
    """Address that the process serves, or a description of what it does."""


class Lock:
    """A file lock that the kernel releases when its holder ends. The file identifies the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, owner: Owner) -> None:
        """Acquire the lock without waiting, and record the owner.

        Raises:
            AlreadyRunning: Another process holds the lock.
            OSError: The file cannot be created or written.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fd = fd
            self.write(owner)
        except BlockingIOError:
            os.close(fd)
            raise AlreadyRunning(_already_running_message(self.path)) from None
        except BaseException:
            # For example on a full disk. A file that stays open would stay locked.
            self._fd = None
            os.close(fd)
            raise

    def write(self, owner: Owner) -> None:
        """Record the owner in the file. Does nothing when this object does not hold the lock."""
        if self._fd is not None:
            text = f"{owner.pid}\n{owner.listen}\n".encode()
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def release(self) -> None:
        """Release the lock.

        The file is kept: if it were removed, two processes could lock two files of the same name.
        """
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None


class Postmaster(NamedTuple):
    """The server on a data folder, as PostgreSQL's file `postmaster.pid` describes it."""

    pid: int
    pgdata: str
    socket_dir: Path
    status: str

    @classmethod
    def read(cls, pgdata: Path) -> Self | None:
        """Read the file. Return None when it is missing or not yet complete.

        Raises:
            EmbeddedError: The data belongs to another user.
        """
        try:
            lines = (pgdata / "postmaster.pid").read_text().splitlines()
            return cls(int(lines[0]), lines[1], Path(lines[4]), lines[7].strip())
        except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
            return None
        except PermissionError:
            raise EmbeddedError(
                f"the data in {pgdata} belongs to another user: run as that user, or set "
                "CHAT_HISTORY_DATA_DIR to another folder"
            ) from None

    def is_alive(self) -> bool:
        """Return whether the server runs. A process that reused its process id does not count."""
        _, command_line = _program_and_command_line(self.pid)
        return is_postgres(self.pid) and self.pgdata in command_line


def running_url(data_dir: Path) -> str | None:
    """Return the connection string of the server that runs on a data folder.

    Returns:
        None when no server runs there. It does not matter which process started the server.

    Raises:
        EmbeddedError: The folder belongs to another user.
    """
    server = Postmaster.read(data_dir.expanduser().resolve() / "postgres")
    if server is None or server.status != "ready" or not server.is_alive():
        return None
    return socket_url(server.socket_dir)


def owner(data_dir: Path) -> Owner | None:
    """Return the running owner of a data folder according to its lock file, or None.

    The lock itself is not tried: that would make a process fail that starts at this moment.
    """
    try:
        pid, listen = (data_dir.expanduser().resolve() / "lock").read_text().splitlines()[:2]
        holder = Owner(int(pid), listen)
    except (OSError, ValueError):
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # The process exists and belongs to another user.
    return holder


def _already_running_message(lock: Path) -> str:
    for _ in range(20):
        # Retried: the file is empty between the holder's lock and its write.
        if (holder := owner(lock.parent)) is not None:
            return (
                f"ChatHistory is already running (process {holder.pid}, listening on "
                f"{holder.listen}) on this data folder: {lock.parent}"
            )
        time.sleep(0.05)
    return f"ChatHistory is already running on this data folder: {lock.parent}"


def socket_url(socket_dir: Path) -> str:
    """Return the connection string of the server with its socket in the given folder."""
    return f"postgresql://postgres@/postgres?host={quote(str(socket_dir), safe='/')}"


def stop_server(pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
    """Stop a server: fast shutdown, then immediate shutdown, then SIGKILL, each after a timeout.

    Args:
        pid: Process id of the postmaster.
        child: The same process, when it is a child of this one and must be reaped.
    """
    for signal_number, timeout_s in (
        (signal.SIGINT, FAST_SHUTDOWN_TIMEOUT_S),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_TIMEOUT_S),
        (signal.SIGKILL, IMMEDIATE_SHUTDOWN_TIMEOUT_S),
    ):
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (child is None and not is_postgres(pid)) or (
                child is not None and child.poll() is not None
            ):
                return
            time.sleep(0.01)


def is_postgres(pid: int) -> bool:
    """Return whether a process with this id runs and is PostgreSQL."""
    program, _ = _program_and_command_line(pid)
    return Path(program).name.startswith("postgres")


def _program_and_command_line(pid: int) -> tuple[str, str]:
    """Return a process's program and command line; empty strings for a dead one or a zombie."""
    if Path("/proc/self").exists():
        try:
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            command_line = ""
        return command_line.split("\0", 1)[0], command_line
    program, command_line = (
        subprocess.run(  # noqa: S603
            ["/bin/ps", "-p", str(pid), "-o", column], check=False, capture_output=True, text=True
        ).stdout.strip()
        for column in ("comm=", "command=")
    )
    return program, command_line
