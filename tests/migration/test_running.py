"""Migrations run one at a time, with short lock waits, and keep older and newer builds running."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import Connection, text

from service.store import tables
from service.store.db.dsn import Target
from service.store.schema import migrations
from service.store.schema.migrations import MigrationError
from service.store.schema.version import SchemaVersion
from tests.migration.test_schema import url_of
from tests.support.cluster import OWN_SETTINGS, fetch

ROOT = Path(migrations.SCRIPTS_DIR).parent


@asynccontextmanager
async def holding(target: Target, statement: str) -> AsyncGenerator[asyncpg.Connection]:
    """Keep a transaction open in which a statement was executed."""
    connection = await asyncpg.connect(url_of(target), server_settings=OWN_SETTINGS)
    try:
        async with connection.transaction():
            await connection.execute(statement)
            yield connection
    finally:
        await connection.close()


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "100ms")
    monkeypatch.setattr(migrations, "STATEMENT_TIMEOUT", "300ms")
    monkeypatch.setattr(migrations, "RETRY_PAUSE_S", 0.1)


async def test_of_concurrent_migrators_one_migrates(empty: Target) -> None:
    results = await asyncio.gather(*(migrations.upgrade(empty) for _ in range(5)))
    assert sorted(result.before for result in results) == [0] + [tables.BUILD] * 4
    assert {result.after for result in results} == {tables.BUILD}
    assert (
        str(results[0]).startswith("migrated")
        or str(results[0]) == f"nothing to do: the schema is at revision {tables.BUILD:04d}"
    )


async def test_a_migrator_waits_for_another_one_without_a_snapshot(empty: Target) -> None:
    waiting = asyncio.Event()
    async with holding(
        empty, f"SELECT pg_advisory_xact_lock({migrations.ADVISORY_LOCK_KEY})"
    ) as other:
        task = asyncio.create_task(migrations.upgrade(empty, on_wait=lambda _reason: waiting.set()))
        await waiting.wait()
        snapshots = await other.fetch(
            "SELECT 1 FROM pg_stat_activity"
            " WHERE application_name = 'chat-history' AND backend_xmin IS NOT NULL"
        )
        assert snapshots == []
        assert not task.done()
    assert (await task).after == tables.BUILD


async def test_a_wait_for_another_migrator_times_out(
    empty: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "MIGRATOR_TIMEOUT_S", 0.0)
    async with holding(empty, f"SELECT pg_advisory_xact_lock({migrations.ADVISORY_LOCK_KEY})"):
        with pytest.raises(MigrationError, match="another migration did not end"):
            await migrations.upgrade(empty)


async def test_a_locked_migration_is_retried(empty: Target, short_timeouts: None) -> None:
    reasons: list[str] = []
    waiting = asyncio.Event()

    def on_wait(reason: str) -> None:
        reasons.append(reason)
        waiting.set()

    # The uncommitted CREATE TABLE locks the name of a table that the migration creates.
    await fetch(url_of(empty), "CREATE SCHEMA chathistory")
    async with holding(empty, "CREATE TABLE chathistory.users (id int)") as other:
        task = asyncio.create_task(migrations.upgrade(empty, on_wait=on_wait))
        await waiting.wait()
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await other.execute("roll back")
    assert (await task).after == tables.BUILD
    assert "other transactions hold the locks" in reasons[0]


async def test_a_migration_that_stays_locked_fails_with_advice(
    empty: Target, short_timeouts: None
) -> None:
    await migrations.upgrade(empty)
    async with holding(empty, "LOCK TABLE chat_messages IN ACCESS SHARE MODE"):
        with pytest.raises(MigrationError, match="end long transactions"):
            await migrations.downgrade(empty)
    assert (await migrations.upgrade(empty)).before == tables.BUILD


async def test_a_slow_statement_fails_the_migration(
    empty: Target, short_timeouts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        migrations, "_upgrade", lambda connection: connection.execute(text("SELECT pg_sleep(5)"))
    )
    with pytest.raises(MigrationError, match="statement_timeout"):
        await migrations.upgrade(empty)


async def test_timeouts_are_set_and_a_migration_can_raise_them(empty: Target) -> None:
    timeouts: list[str] = []

    def read_timeouts(connection: Connection) -> None:
        timeouts.extend(
            connection.scalar(text(f"SHOW {name}")) or ""
            for name in ("lock_timeout", "statement_timeout")
        )
        connection.execute(text("SET LOCAL statement_timeout = '5min'"))

    await migrations.in_transaction(empty, read_timeouts)
    assert timeouts == ["4s", "5s"]


async def test_a_newer_schema_is_unchanged(empty: Target) -> None:
    await migrations.upgrade(empty)
    newer = tables.BUILD + 6
    await fetch(url_of(empty), f"UPDATE alembic_version SET version_num = '{newer:04d}'")
    result = await migrations.upgrade(empty)
    assert (result.before, result.after, result.problem) == (newer, newer, None)
    assert "newer than this build's revision" in str(result)


async def test_a_contracted_schema_rejects_older_builds(empty: Target) -> None:
    await migrations.upgrade(empty)
    await fetch(url_of(empty), f"UPDATE schema_info SET min_build = {tables.BUILD + 1}")
    problem = (await migrations.upgrade(empty)).problem
    assert problem is not None
    assert "deploy a newer one" in problem


def test_the_problem_of_an_older_schema_names_the_command() -> None:
    problem = SchemaVersion(tables.REQUIRED_REVISION - 1, 0).problem
    assert problem is not None
    assert "chat-history migrate" in problem


async def test_the_tables_of_another_application_are_unchanged(empty: Target) -> None:
    await fetch(url_of(empty), "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    await fetch(url_of(empty), "INSERT INTO alembic_version VALUES ('ae1027a6acf')")
    with pytest.raises(MigrationError, match="another application"):
        await migrations.upgrade(replace(empty, schema="public"))
    assert (await migrations.upgrade(empty)).after == tables.BUILD
    [row] = await fetch(
        url_of(empty),
        "SELECT version_num, to_regclass('public.users') IS NULL AS bare"
        " FROM public.alembic_version",
    )
    assert tuple(row) == ("ae1027a6acf", True)


async def test_a_revision_that_no_build_has_is_refused(empty: Target) -> None:
    await migrations.upgrade(empty)
    await migrations.downgrade(empty, "0001")
    await fetch(url_of(empty), "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(MigrationError, match="another application"):
        await migrations.upgrade(empty)


async def test_missing_scripts_fail_with_a_message(
    empty: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "SCRIPTS_DIR", tmp_path / "alembic")
    with pytest.raises(MigrationError, match="not installed"):
        await migrations.upgrade(empty)


async def test_the_logging_configuration_is_unchanged(empty: Target) -> None:
    logger, root = logging.getLogger("application"), logging.getLogger()
    before = (root.level, list(root.handlers), logger.disabled)
    await migrations.upgrade(empty)
    assert (root.level, list(root.handlers), logger.disabled) == before


async def test_alembic_is_not_loaded_for_a_current_schema(empty: Target) -> None:
    await migrations.upgrade(empty)
    program = (
        "import asyncio, sys; from service.store.schema import migrations;"
        " from service.store.db.dsn import parse;"
        " print(asyncio.run(migrations.upgrade(parse(sys.argv[1]))));"
        " sys.exit('alembic' in sys.modules)"
    )
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, url_of(empty)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "nothing to do" in process.stdout


async def alembic(target: Target, *arguments: str, cwd: Path = ROOT) -> str:
    """Run the `alembic` command of developers."""
    environment = os.environ | {"DATABASE_URL": url_of(target)}
    command = [str(Path(sys.executable).with_name("alembic")), *arguments]
    process = await asyncio.to_thread(
        lambda: subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=cwd, env=environment
        )
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout


async def test_the_alembic_command_of_developers_works(empty: Target) -> None:
    await alembic(empty, "upgrade", "head")
    assert f"{tables.BUILD:04d} (head)" in await alembic(empty, "current")
    assert "No new upgrade operations" in await alembic(empty, "check")


async def test_a_new_revision_takes_the_next_number(empty: Target, tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "alembic", tmp_path / "alembic", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    await alembic(empty, "upgrade", "head", cwd=tmp_path)
    await alembic(empty, "revision", "-m", "more", cwd=tmp_path)
    script = tmp_path / "alembic" / "versions" / f"{tables.BUILD + 1:04d}_more.py"
    assert f'down_revision = "{tables.BUILD:04d}"' in script.read_text()


@pytest.mark.timeout(300)
async def test_an_installed_wheel_migrates_without_a_checkout(
    empty: Target, tmp_path: Path
) -> None:
    def migrate() -> subprocess.CompletedProcess[str]:
        build = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "-t",
            "wheel",
            "-d",
            str(tmp_path / "dist"),
        ]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        [wheel] = (tmp_path / "dist").iterdir()
        shutil.unpack_archive(wheel, tmp_path / "site", "zip")
        # First in the path, before the checkout that the environment has installed.
        environment = os.environ | {
            "PYTHONPATH": str(tmp_path / "site"),
            "DATABASE_URL": url_of(empty),
        }
        program = "import service; print(service.__file__); from service.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, "migrate"],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )

    process = await asyncio.to_thread(migrate)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(str(tmp_path / "site"))
    [row] = await fetch(url_of(empty), "SELECT to_regclass('chat_messages') AS name")
    assert row["name"] is not None
