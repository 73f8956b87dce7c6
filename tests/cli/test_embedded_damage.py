"""A damaged data folder or a full disk is reported in one line; a killed first start recovers."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from service.embedded import postgres as embedded_postgres
from service.embedded.data_dir import EmbeddedError, Postmaster, owner
from service.embedded.failures import explain
from service.embedded.postgres import EmbeddedPostgres
from service.embedded.server import Server
from tests.cli.conftest import Command, Start

pytestmark = pytest.mark.faults

WAIT_S = 60.0


@pytest.fixture
def data(folder: Path) -> Path:
    """Provide a data folder with a database that was shut down."""
    with EmbeddedPostgres(folder / ".data", "here"):
        pass
    return folder / ".data"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def empty_version(pgdata: Path) -> None:
    (pgdata / "PG_VERSION").write_bytes(b"")


def write_junk_version(pgdata: Path) -> None:
    (pgdata / "PG_VERSION").write_bytes(b"\x00\xff not a number\n")


def delete_version(pgdata: Path) -> None:
    (pgdata / "PG_VERSION").unlink()


def delete_wal_folder(pgdata: Path) -> None:
    shutil.rmtree(pgdata / "pg_wal")


def delete_wal_files(pgdata: Path) -> None:
    for path in (pgdata / "pg_wal").iterdir():
        if path.is_file():
            path.unlink()


def delete_control_file(pgdata: Path) -> None:
    (pgdata / "global" / "pg_control").unlink()


def write_junk_control_file(pgdata: Path) -> None:
    file = pgdata / "global" / "pg_control"
    file.write_bytes(b"\xff" * file.stat().st_size)


def change_control_file(pgdata: Path) -> None:
    file = pgdata / "global" / "pg_control"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)


@pytest.mark.case(n=521)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty_version, ("postgres/PG_VERSION does not hold a version number", "cp -p")),
        (write_junk_version, ("postgres/PG_VERSION does not hold a version number", "cp -p")),
        (delete_version, ("postgres/PG_VERSION is missing", "cp -p")),
        (delete_wal_folder, ("write-ahead log in", "postgres/pg_wal is lost", "pg_resetwal")),
        (delete_wal_files, ("write-ahead log in", "postgres/pg_wal is lost", "pg_resetwal")),
        (delete_control_file, ("postgres/global/pg_control is missing or damaged",)),
        (write_junk_control_file, ("postgres/global/pg_control is missing or damaged",)),
        (change_control_file, ("postgres/global/pg_control is missing or damaged",)),
    ],
)
def test_damaged_data_is_reported_in_one_line_that_names_file_and_remedy(
    start: Start, data: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    damage(data / "postgres")
    files = sorted(path.name for path in data.iterdir())
    for name in ("serve", "migrate"):
        command = start(name)
        assert command.wait() == 1
        [line] = command.stderr.splitlines()
        assert line.startswith("chat-history: ")
        for expected in (*words, "Restore the data folder from a backup"):
            assert expected in line, line
    assert owner(data) is None
    assert sorted(path.name for path in data.iterdir()) == files, "a new database was created"


@pytest.mark.case(n=521)
@pytest.mark.parametrize("damage", [empty_version, write_junk_version, delete_version])
def test_remedy_for_a_damaged_version_works_and_check_names_it(
    start: Start, data: Path, damage: Callable[[Path], None]
) -> None:
    damage(data / "postgres")
    check = start("check")
    assert check.wait() == 1
    [line] = [line for line in check.stdout.splitlines() if "PG_VERSION" in line]
    assert line.startswith("todo  data")
    subprocess.run(line.split("`")[1].split(), check=True)
    assert start("migrate").wait() == 0


@pytest.mark.case(n=521)
def test_panic_is_reported_although_other_messages_follow() -> None:
    log = """\
2026-11-28 01:00:00.000 UTC [7] LOG:  database system was shut down at 2026-11-28 00:59:59 UTC
2026-11-28 01:00:00.001 UTC [8] FATAL:  the database system is starting up
2026-11-28 01:00:00.002 UTC [7] LOG:  invalid checkpoint record
2026-11-28 01:00:00.003 UTC [7] PANIC:  could not locate a valid checkpoint record at 0/1
2026-11-28 01:00:00.004 UTC [6] LOG:  startup process (PID 7) was terminated by signal 6: Aborted
2026-11-28 01:00:00.005 UTC [6] LOG:  aborting startup due to startup process failure
2026-11-28 01:00:00.006 UTC [6] LOG:  database system is shut down
"""
    assert explain(
        log, Path("/data/postgres"), log=Path("/data/postgres.log"), free_bytes=2**40
    ) == (
        "could not locate a valid checkpoint record at 0/1: the write-ahead log in "
        "/data/postgres/pg_wal is lost or damaged. Restore the data folder from a backup. Without "
        "one, pg_resetwal can open the data, and messages may be lost (see /data/postgres.log)"
    )


def test_message_without_a_known_cause_is_reported_as_it_is() -> None:
    log = "[1] LOG:  starting PostgreSQL\n[1] FATAL:  something new\n[1] LOG:  shut down\n"
    text = explain(log, Path("/data/postgres"), log=Path("/data/log"), free_bytes=2**40)
    assert text == "something new (see /data/log)"


def test_errors_of_the_configuration_are_reported_with_the_file(data: Path) -> None:
    with (data / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("work_mem = 'nonsense'\n")
    with pytest.raises(EmbeddedError) as caught:
        EmbeddedPostgres(data, "here").start()
    assert 'invalid value for parameter "work_mem": "nonsense"' in str(caught.value)
    assert "postgresql.conf" in str(caught.value)
    assert "correct that file" in str(caught.value)


@pytest.mark.case(n=505)
@pytest.mark.parametrize(
    "log",
    [
        '[7] FATAL:  could not write to file "pg_wal/xlogtemp.7": No space left on device\n',
        (
            '[7] PANIC:  could not write to file "pg_wal/xlogtemp.7": No space left on device\n'
            "[6] LOG:  database system is shut down\n"
        ),
        "",
    ],
)
def test_full_disk_is_reported_even_if_the_log_could_not_be_written(log: str) -> None:
    text = explain(log, Path("/data/postgres"), log=Path("/data/log"), free_bytes=0)
    assert "the disk of /data/postgres is full (0 MiB free): make room there" in text


def test_empty_log_alone_is_not_taken_for_a_full_disk() -> None:
    text = explain("", Path("/data/postgres"), log=Path("/data/log"), free_bytes=2**40)
    assert text == "it ended without a message (see /data/log)"


@pytest.fixture
def full_disk(data: Path) -> Path:
    """Let a file that PostgreSQL writes at every start be on a full device."""
    file = data / "postgres" / "postmaster.opts"
    file.unlink()
    file.symlink_to("/dev/full")
    return file


@pytest.mark.case(n=505)
def test_start_on_a_full_disk_says_so_and_succeeds_once_there_is_room(
    start: Start, data: Path, full_disk: Path
) -> None:
    command = start("serve")
    assert command.wait() == 1
    [line] = command.stderr.splitlines()
    assert f"the disk of {data}/postgres is full" in line
    assert "make room there and start again" in line
    full_disk.unlink()
    assert start("migrate").wait() == 0


@pytest.mark.case(n=505)
def test_full_disk_at_the_lock_is_reported_and_leaves_no_lock(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(EmbeddedError, match=f"the disk of {data} is full: make room there"):
            EmbeddedPostgres(data, "here").start()
    with EmbeddedPostgres(data, "here") as postgres:
        assert postgres.pid is not None


@pytest.mark.case(n=505)
def test_failed_restarts_are_reported_once_for_each_reason(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_postgres, "RESTART_DELAY_S", 0.01)
    attempts = 0
    start_server = Server.start

    def count(self: Server) -> None:
        nonlocal attempts
        attempts += 1
        start_server(self)

    messages: list[str] = []
    with EmbeddedPostgres(data, "here") as postgres:
        monkeypatch.setattr(Server, "start", count)
        postgres.supervise(messages.append)
        file = data / "postgres" / "postmaster.opts"
        file.unlink()
        file.symlink_to("/dev/full")
        with postgres.log.open("a") as log:
            log.write('[7] PANIC:  could not write to file "pg_wal/x": No space left on device\n')
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        wait_until(lambda: attempts >= 5)
        ended, failed = messages
        assert "ended with code -9" in ended
        assert 'could not write to file "pg_wal/x"' in ended
        assert "cannot start: " in failed
        for message in messages:
            assert f"the disk of {data}/postgres is full" in message
            assert "\n" not in message
        file.unlink()
        wait_until(lambda: len(messages) > 2)
        assert messages[2:] == ["the embedded PostgreSQL was restarted"]


@pytest.fixture
def small_disk(folder: Path) -> Generator[Path]:
    """Provide a folder on a disk of 160 MiB."""
    small = folder / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160m,mode=0711", "none", str(small)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a small disk")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.case(n=505)
def test_disk_without_room_is_reported_until_there_is_room(small_disk: Path) -> None:
    with EmbeddedPostgres(small_disk / "data", "here"):
        pass
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 1):  # The second size fills what the first one leaves of the last page.
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(EmbeddedError, match=r"the disk of .* is full"):
        EmbeddedPostgres(small_disk / "data", "here").start()
    assert owner(small_disk / "data") is None
    filler.unlink()
    with EmbeddedPostgres(small_disk / "data", "here") as postgres:
        assert postgres.pid is not None


class FirstStart:
    """The states of a first start, each of which a test can wait for."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / ".data"
        self.pgdata = self.data / "postgres"
        self._unfinished: set[Path] = set()
        self._pid: int | None = None

    def remember(self) -> None:
        """Remember what earlier starts have left."""
        self._unfinished = set(self.data.glob("postgres.new-*"))
        server = Postmaster.read(self.pgdata)
        self._pid = server.pid if server is not None else None

    def is_locked(self) -> bool:
        return owner(self.data) is not None

    def has_file(self, name: str = "") -> bool:
        """Return whether initdb of this start has written a file, or its folder."""
        new = set(self.data.glob("postgres.new-*")) - self._unfinished
        return any((folder / name).exists() for folder in new)

    def is_initialized(self) -> bool:
        return self.pgdata.exists()

    def is_starting(self) -> bool:
        server = Postmaster.read(self.pgdata)
        return server is not None and server.pid != self._pid

    def is_ready(self) -> bool:
        server = Postmaster.read(self.pgdata)
        return server is not None and server.pid != self._pid and server.status == "ready"


@pytest.mark.case(n=519)
@pytest.mark.timeout(300)
def test_first_start_recovers_from_twelve_kills(start: Start, folder: Path) -> None:
    first_start = FirstStart(folder)
    states: list[Callable[[], bool]] = [
        first_start.is_locked,
        first_start.has_file,
        lambda: first_start.has_file("PG_VERSION"),
        lambda: first_start.has_file("base/1"),
        lambda: first_start.has_file("global/pg_control"),
        lambda: first_start.has_file("base/1/pg_filenode.map"),
        lambda: first_start.has_file("base/4"),
        first_start.is_initialized,
        first_start.is_starting,
        first_start.is_starting,
        first_start.is_ready,
        first_start.is_ready,
    ]
    assert len(states) == 12
    for number, is_reached in enumerate(states):
        first_start.remember()
        command = start("serve", CHAT_HISTORY_SEARCH="off")
        wait_until(lambda: is_reached() or has_ended(command))  # noqa: B023 - called in the loop
        assert command.process.poll() is None, f"state {number} was missed:\n{command.stderr}"
        if number % 2:  # With initdb, which is in the same process group.
            os.killpg(command.process.pid, signal.SIGKILL)
        else:
            command.process.kill()
        assert command.wait() == -signal.SIGKILL
    last = start("serve", CHAT_HISTORY_SEARCH="off")
    last.wait_for("Ctrl-C")
    last.process.send_signal(signal.SIGINT)
    assert last.wait() == 0
    check = start("check")
    assert check.wait() == 1
    assert "To do: 1." in check.stdout
    assert "not running; start it" in check.stdout


def has_ended(command: Command) -> bool:
    return command.process.poll() is not None
