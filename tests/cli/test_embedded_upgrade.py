"""`chat-history embedded upgrade`: data of an older major version, by dump and restore."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

from service.embedded import postgres as embedded_postgres
from service.embedded import upgrade
from service.embedded.data_dir import EmbeddedError, Postmaster, owner
from service.embedded.database_copy import DatabaseCopy
from service.embedded.postgres import EmbeddedPostgres
from service.embedded.programs import find_programs
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.cli.conftest import TIMEOUT_S, Start
from tests.support import tls_postgres
from tests.support.chat import Chat, new_messages
from tests.support.cluster import fetch
from tests.support.servers import connected, serving
from tests.support.tools import skip_or_fail

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

UPGRADE_TIMEOUT_S = 240.0
OLDEST, NEWEST = min(find_programs()), max(find_programs())
_EXTRAS = (
    "CREATE ROLE reader LOGIN PASSWORD 'a password'",
    "ALTER ROLE reader SET search_path = chat, public",
    "ALTER DATABASE postgres SET work_mem = '5MB'",
    "ALTER ROLE reader IN DATABASE postgres SET work_mem = '6MB'",
    'CREATE DATABASE "other\'s"',
)
_OTHER_EXTRAS = (
    "CREATE TABLE kept (n int GENERATED ALWAYS AS IDENTITY, t text)",
    "INSERT INTO kept (t) VALUES ('one'), ('two')",
    "GRANT SELECT ON kept TO reader",
)
_TABLE = (
    "SELECT format('%I.%I', nspname, relname) FROM pg_class "
    "JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE relkind = 'r' AND relname = $1"
)
# Runs an upgrade and kills its process at the end of a step.
_KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
from service.embedded import upgrade

_, path, data = sys.argv
owner_name, _, name = path.rpartition(".")
owner = getattr(upgrade, owner_name) if owner_name else upgrade
step = getattr(owner, name)

def run_and_die(*arguments):
    step(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, run_and_die)
upgrade.upgrade(Path(data), print)
"""


def run_all(url: str, statements: Iterable[str]) -> None:
    for statement in statements:
        asyncio.run(fetch(url, statement))


def other_url(url: str) -> str:
    return url.replace("/postgres?", "/other's?", 1)


async def fill(url: str) -> None:
    """Store a user with a session of 200 messages."""
    await migrations.upgrade(parse(url))
    async with serving(url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(100, "Ünïcödé 🐦"))
        await chat.append(session_id, new_messages(100, "back\\slash\tand 'quote'"))


def create_data(folder: Path, version: int, bin_dir: Path) -> None:
    """Create a data folder of a version, with messages and what an operator may have added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_postgres, "find_programs", lambda: {version: bin_dir})
        with EmbeddedPostgres(folder, "here") as postgres:
            asyncio.run(fill(postgres.url))
            run_all(postgres.url, _EXTRAS)
            run_all(other_url(postgres.url), _OTHER_EXTRAS)


@pytest.fixture(scope="module")
def old_data() -> Generator[Path]:
    """Provide a data folder of the oldest version, which no test changes."""
    if OLDEST == NEWEST:
        skip_or_fail("the installed package contains one version only")
    folder = Path(tempfile.mkdtemp(prefix="chat-history-folder-")).resolve()
    folder.chmod(0o711)
    create_data(folder / "data", OLDEST, find_programs()[OLDEST])
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
def data(old_data: Path, folder: Path) -> Path:
    """Provide a data folder of the oldest version, in the working folder of commands."""
    subprocess.run(["cp", "-a", str(old_data), str(folder / ".data")], check=True)
    return folder / ".data"


def contents(data: Path) -> tuple[int, list[str]]:
    """Return the major version of the server that starts on the data, and every message."""

    async def read(url: str) -> tuple[int, list[str]]:
        [[version]] = await fetch(url, "SELECT current_setting('server_version_num')::int / 10000")
        [[table]] = await fetch(url, _TABLE, "chat_messages")
        rows = await fetch(url, f"SELECT message::text FROM {table} AS message ORDER BY 1")
        return version, [row[0] for row in rows]

    with EmbeddedPostgres(data, "here") as postgres:
        return asyncio.run(read(postgres.url))


def ignore(_message: str) -> None:
    pass


def folders(data: Path) -> set[str]:
    """Return the names of the databases in a data folder."""
    return {path.name for path in data.glob("postgres*") if path.is_dir()}


KEPT = f"postgres.before-upgrade-{OLDEST}"


def test_upgrade_keeps_every_row_and_the_old_data(start: Start, data: Path) -> None:
    version, messages = contents(data)
    assert (version, len(messages)) == (OLDEST, 200)
    command = start("embedded", "upgrade")
    assert command.wait(UPGRADE_TIMEOUT_S) == 0, command.stderr
    assert f"upgraded to PostgreSQL {NEWEST}" in command.stderr
    assert f"is kept in {data / KEPT}" in command.stderr
    assert folders(data) == {"postgres", KEPT}
    assert (data / KEPT / "PG_VERSION").read_text() == f"{OLDEST}\n"
    assert contents(data) == (NEWEST, messages)
    again = start("embedded", "upgrade")
    assert again.wait() == 0
    assert "nothing to do" in again.stderr
    assert start("migrate").wait() == 0


def test_upgrade_keeps_roles_settings_and_other_databases(data: Path) -> None:
    upgrade.upgrade(data, ignore)
    with EmbeddedPostgres(data, "here") as postgres:
        other = asyncio.run(fetch(other_url(postgres.url), "SELECT n, t FROM kept ORDER BY n"))
        assert [tuple(row) for row in other] == [(1, "one"), (2, "two")]
        [row] = asyncio.run(
            fetch(other_url(postgres.url), "INSERT INTO kept (t) VALUES ('three') RETURNING n")
        )
        assert row["n"] == 3
        url = postgres.url
        [row] = asyncio.run(fetch(url, "SELECT current_setting('work_mem')"))
        assert row[0] == "5MB"
        roles = asyncio.run(
            fetch(url, "SELECT rolcanlogin, rolconfig FROM pg_roles WHERE rolname = 'reader'")
        )
        assert [tuple(row) for row in roles] == [(True, ["search_path=chat, public"])]
        settings = "SELECT setconfig FROM pg_db_role_setting WHERE setdatabase <> 0 ORDER BY 1"
        rows = asyncio.run(fetch(url, settings))
        assert [row[0] for row in rows] == [["work_mem=5MB"], ["work_mem=6MB"]]
        for privilege, is_granted in (("SELECT", True), ("INSERT", False)):
            sql = f"SELECT has_table_privilege('reader', 'kept', '{privilege}')"
            [row] = asyncio.run(fetch(other_url(url), sql))
            assert row[0] is is_granted


def test_settings_of_alter_system_are_reported(data: Path) -> None:
    with (data / "postgres" / "postgresql.auto.conf").open("a") as file:
        file.write("work_mem = '7MB'\n")
    messages: list[str] = []
    upgrade.upgrade(data, messages.append)
    assert "these settings of ALTER SYSTEM are not copied, so set them again: work_mem" in messages


def test_upgrade_with_programs_of_another_installation(folder: Path) -> None:
    bin_dir = tls_postgres.find_programs()
    if bin_dir is None:
        skip_or_fail("Debian's postgresql is not installed")
    version = int(bin_dir.parent.name)
    if version in find_programs():
        skip_or_fail("Debian's postgresql has a version of the package")
    data = folder / ".data"
    create_data(data, version, bin_dir)
    with pytest.raises(EmbeddedError, match=rf"is of PostgreSQL {version}, .*--old-programs"):
        EmbeddedPostgres(data, "here").start()
    upgrade.upgrade(data, ignore, bin_dir)
    number, messages = contents(data)
    assert (number, len(messages)) == (NEWEST, 200)


@pytest.mark.parametrize(
    "step",
    [
        "run_initdb",
        "DatabaseCopy.run",
        "DatabaseCopy.verify",
        "mark_complete",
        "keep_previous",
        "put_in_place",
    ],
)
def test_killed_upgrade_loses_nothing_and_can_be_repeated(data: Path, step: str) -> None:
    _, messages = contents(data)
    command = [sys.executable, "-W", "error", "-c", _KILL_SCRIPT, step, str(data)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert owner(data) is None
    is_replaced = step in ("keep_previous", "put_in_place")
    # A start ends an interrupted replacement, and otherwise uses the old data.
    assert contents(data) == (NEWEST if is_replaced else OLDEST, messages)
    assert folders(data) == ({"postgres", KEPT} if is_replaced else {"postgres"})
    upgrade.upgrade(data, ignore)
    assert contents(data) == (NEWEST, messages)
    assert folders(data) == {"postgres", KEPT}


def test_rows_written_after_an_interrupted_upgrade_are_kept(data: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _KILL_SCRIPT, "mark_complete", str(data)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert "postgres.upgraded" in folders(data)
    with EmbeddedPostgres(data, "here") as postgres:
        asyncio.run(fetch(postgres.url, "CREATE TABLE written AS SELECT 1 AS n"))
    upgrade.upgrade(data, ignore)
    with EmbeddedPostgres(data, "here") as postgres:
        assert len(asyncio.run(fetch(postgres.url, "SELECT n FROM written"))) == 1


def test_interrupted_command_leaves_the_data_and_no_server(start: Start, data: Path) -> None:
    command = start("embedded", "upgrade")
    deadline = time.monotonic() + TIMEOUT_S
    while "copying the database" not in command.stderr:
        assert command.process.poll() is None, command.stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 130
    # A signal that arrives while Python starts a program makes it warn of that program afterwards,
    # since warnings are on here.
    report, interrupted, _ = command.stderr.partition("chat-history: interrupted\n")
    assert interrupted
    assert "Traceback" not in report
    assert folders(data) == {"postgres"}
    assert Postmaster.read(data / "postgres") is None
    assert owner(data) is None
    assert contents(data)[0] == OLDEST


def test_upgrade_is_refused_while_the_service_runs(start: Start, data: Path) -> None:
    serving_command = start("serve", CHAT_HISTORY_SEARCH="off")
    serving_command.wait_for("Ctrl-C")
    assert "`chat-history embedded upgrade` upgrades the data" in serving_command.stderr
    command = start("embedded", "upgrade")
    assert command.wait() == 2
    assert "already running" in command.stderr
    assert serving_command.process.poll() is None
    check = start("check")
    assert check.wait() == 0, check.stdout
    assert re.search(r"^note +data .*`chat-history embedded upgrade`", check.stdout, re.MULTILINE)


def test_copy_that_differs_is_not_used(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed(DatabaseCopy):
        def run(self) -> None:
            super().run()
            self._query(self._target, "UPDATE kept SET t = 'changed' WHERE n = 1", "other's")

    before = contents(data)
    monkeypatch.setattr(upgrade, "DatabaseCopy", Changed)
    words = "is unchanged: the copy of public.kept in the database other's differs"
    with pytest.raises(EmbeddedError, match=words):
        upgrade.upgrade(data, ignore)
    assert folders(data) == {"postgres"}
    assert contents(data) == before


def test_addresses_that_the_new_version_takes_for_equal_are_reported(data: Path) -> None:
    """The old version folds the case of A to Z only, the new one that of every letter."""
    ids = [f"00000000-0000-4000-8000-00000000000{number}" for number in (1, 2)]
    with EmbeddedPostgres(data, "here") as postgres:
        [[users]] = asyncio.run(fetch(postgres.url, _TABLE, "users"))
        for user_id, email in zip(ids, ("É@example.com", "é@example.com"), strict=True):
            insert = f"INSERT INTO {users} (id, email, fingerprint) VALUES ($1, $2, '')"
            asyncio.run(fetch(postgres.url, insert, user_id, email))
    with pytest.raises(EmbeddedError) as caught:
        upgrade.upgrade(data, ignore)
    assert f"{ids[0]} and {ids[1]}" in str(caught.value)
    assert "@example.com" not in str(caught.value)
    assert folders(data) == {"postgres"}
    with EmbeddedPostgres(data, "here") as postgres:
        change = f"UPDATE {users} SET email = 'other@example.com' WHERE id = $1"
        asyncio.run(fetch(postgres.url, change, ids[1]))
    upgrade.upgrade(data, ignore)
    assert contents(data)[0] == NEWEST


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("15", r"is of PostgreSQL 15, .*--old-programs FOLDER"),
        ("99", r"is of PostgreSQL 99, .*install a version of the package that contains 99"),
        ("junk", r"PG_VERSION does not hold a version number"),
    ],
)
def test_version_without_programs_is_reported_with_what_to_do(
    data: Path, version: str, words: str
) -> None:
    (data / "postgres" / "PG_VERSION").write_text(f"{version}\n")
    with pytest.raises(EmbeddedError, match=words):
        upgrade.upgrade(data, ignore)
    assert owner(data) is None


def test_programs_of_another_version_are_refused(data: Path) -> None:
    words = f"is of PostgreSQL {NEWEST}, and the data in {data}/postgres of {OLDEST}"
    with pytest.raises(EmbeddedError, match=words):
        upgrade.upgrade(data, ignore, find_programs()[NEWEST])
    with pytest.raises(EmbeddedError, match="postgres cannot be executed"):
        upgrade.upgrade(data, ignore, data)
    assert folders(data) == {"postgres"}


def test_upgrade_without_room_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "_free_bytes", lambda _folder: 5 * 1024 * 1024)
    words = r"needs about \d{3} MiB on the disk of .*, which has 5 MiB"
    with pytest.raises(EmbeddedError, match=words):
        upgrade.upgrade(data, ignore)
    assert folders(data) == {"postgres"}


def test_upgrade_does_not_replace_data_of_an_earlier_upgrade(data: Path) -> None:
    (data / KEPT).mkdir()
    with pytest.raises(EmbeddedError, match=f"{KEPT} .*delete or rename it"):
        upgrade.upgrade(data, ignore)
    assert folders(data) == {"postgres", KEPT}


def test_no_database_is_created_next_to_data_from_before_an_upgrade(data: Path) -> None:
    (data / "postgres").rename(data / KEPT)
    with pytest.raises(EmbeddedError, match=rf"rename {data / KEPT} to {data}/postgres to use it"):
        EmbeddedPostgres(data, "here").start()
    assert folders(data) == {KEPT}


def test_upgrade_without_a_database_does_nothing(folder: Path) -> None:
    assert "nothing to do" in upgrade.upgrade(folder / "none", ignore)
    assert not (folder / "none").exists()
    (folder / "empty").mkdir()
    assert "nothing to do" in upgrade.upgrade(folder / "empty", ignore)
