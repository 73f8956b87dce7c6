"""Findings of `chat-history check` on schemas, locks, the locale, servers, addresses, the disk."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.cli import check
from service.doctor import (
    Description,
    SchemaState,
    Verdict,
    check_free_space,
    describe,
    diagnose,
)
from service.store import tables
from service.store.db.dsn import parse
from service.store.db.engine import single_use_engine
from service.store.db.table_locks import TableLock
from service.store.letter_case import _COLLATIONS
from service.store.schema import migrations
from service.store.schema.version import SchemaVersion
from tests.cli.conftest import Start
from tests.support.cluster import Cluster, connected_to, execute, fetch
from tests.support.findings import POOL, findings_of, select
from tests.support.ports import UNUSED_ADDRESS
from tests.support.proxy import postgres_proxy
from tests.support.servers import settings
from tests.support.statements import database_name

pytestmark = pytest.mark.faults

TODO, NOTE = Verdict.TODO, Verdict.NOTE
APPLICATION = """
CREATE TABLE users (id uuid PRIMARY KEY, email text UNIQUE);
CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
INSERT INTO alembic_version VALUES ('0001');
"""
"""The tables of another application, whose Alembic numbers its revisions as ours does."""


# --- Schemas.


@pytest.mark.case(n=513)
async def test_check_of_several_installations_demands_a_choice(database_url: str) -> None:
    target = parse(database_url)
    await migrations.upgrade(replace(target, schema="chat_two"))
    finding = select(await findings_of(target), "schema")
    assert finding.verdict is TODO
    assert "chat_two, chathistory hold tables of ChatHistory: set CHAT_HISTORY_DB_SCHEMA" in (
        finding.message
    )
    findings = await findings_of(replace(target, schema="chat_two"))
    finding = select(findings, "schema")
    assert finding.verdict is Verdict.OK
    assert f"revision {tables.BUILD:04d} in chat_two" in finding.message
    finding = select(findings, "other schemas")
    assert finding.verdict is NOTE
    assert "also in chathistory" in finding.message


@pytest.mark.case(n=513)
@pytest.mark.parametrize("revision", ["0001", "0002"])
async def test_check_lists_what_release_0_1_0_left_among_the_tables_of_an_application(
    database_url: str, revision: str
) -> None:
    await execute(database_url, APPLICATION)
    target = parse(database_url)
    assert "left behind" not in {finding.subject for finding in await findings_of(target)}
    engine = single_use_engine(target, connect_timeout_s=5)
    async with engine.begin() as connection:
        # As release 0.1.0 did it: the first of the path is the application's schema.
        await connection.exec_driver_sql("SET LOCAL search_path TO public")
        if revision == "0002":
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0002'")
        await connection.run_sync(
            lambda sync: migrations.run_alembic(sync, "upgrade", "0003"),
        )
    await engine.dispose()
    finding = select(await findings_of(target), "left behind")
    assert finding.verdict is NOTE
    names = ["public.session_tombstones"]
    if revision == "0001":
        names = [
            *("public.document_chunks", "public.documents"),
            *("public.search_indexes", "public.search_outbox"),
            *names,
        ]
    match = re.search(r"run (DROP TABLE .*?), and set (\S+) back to .* was (\d+)", finding.message)
    assert match is not None
    assert match[1] == f"DROP TABLE {', '.join(names)}"
    assert match[2] == "public.alembic_version"
    assert match[3] == revision
    await fetch(database_url, match[1])
    assert "left behind" not in {finding.subject for finding in await findings_of(target)}


@pytest.mark.case(n=513)
async def test_check_of_a_schema_with_tables_of_an_application_advises_another_one(
    empty_database_url: str,
) -> None:
    await execute(empty_database_url, APPLICATION)
    target = parse(empty_database_url)
    finding = select(await findings_of(replace(target, schema="public")), "schema")
    assert finding.verdict is TODO
    assert "public holds alembic_version, users of another application" in finding.message
    finding = select(await findings_of(target), "schema")
    assert "run `chat-history migrate`" in finding.message


@pytest.mark.parametrize(
    ("preparation", "words"),
    [
        ("SELECT", "CREATE SCHEMA chathistory AUTHORIZATION {role}"),
        ("CREATE SCHEMA chathistory", "GRANT USAGE, CREATE ON SCHEMA chathistory TO {role}"),
    ],
)
async def test_check_names_the_right_that_migrate_would_lack(
    cluster: Cluster, empty_database_url: str, preparation: str, words: str
) -> None:
    admin, name = cluster.url("postgres"), f"chat_{database_name(empty_database_url)}"
    await fetch(admin, f"CREATE ROLE {name} LOGIN")
    try:
        await fetch(empty_database_url, preparation)
        url = empty_database_url.replace("postgres@", f"{name}@", 1)
        finding = select(await findings_of(url), "schema")
        assert finding.verdict is TODO
        assert words.format(role=name) in finding.message
        with pytest.raises(migrations.MigrationError, match=re.escape(words.format(role=name))):
            await migrations.upgrade(parse(url))
    finally:
        await fetch(admin, f"DROP ROLE {name}")


# --- Locks, locale, clock.


@pytest.mark.case(n=509)
async def test_check_names_the_holder_of_a_locked_table(database_url: str) -> None:
    async with connected_to(database_url) as holder:
        pid = await holder.fetchval("SELECT pg_backend_pid()")
        await holder.execute("BEGIN; LOCK TABLE chathistory.alembic_version, chathistory.users")
        findings = await findings_of(database_url)
        lock = select(findings, "locks")
        assert f"the table users is locked by process {pid}" in lock.message
        assert f"SELECT pg_terminate_backend({pid})" in lock.message
        assert "its tables are locked" in select(findings, "schema").message
        await holder.execute("ROLLBACK")
    assert "locks" not in {finding.subject for finding in await findings_of(database_url)}


async def test_lock_on_a_table_of_another_application_is_not_reported(database_url: str) -> None:
    await execute(database_url, APPLICATION)
    async with connected_to(database_url) as holder:
        await holder.execute("BEGIN; LOCK TABLE public.users")
        findings = await findings_of(database_url)
    assert "locks" not in {finding.subject for finding in findings}


@pytest.mark.case(n=516)
async def test_check_names_the_collation_of_a_c_locale_or_that_there_is_none(
    cluster: Cluster,
) -> None:
    name = "locale_check"
    async with connected_to(cluster.url("postgres")) as connection:
        await connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0"
            " ENCODING 'UTF8' LOCALE_PROVIDER libc LOCALE 'C'"
        )
    url = cluster.url(name)
    try:
        await migrations.upgrade(parse(url))
        finding = select(await findings_of(url), "locale")
        assert finding.verdict is Verdict.OK
        assert "lexical search uses the collation" in finding.message
        collations = ", ".join(f"'{collation}'" for collation in _COLLATIONS)
        await execute(url, f"DELETE FROM pg_collation WHERE collname IN ({collations})")
        finding = select(await findings_of(url), "locale")
        assert finding.verdict is NOTE
        assert "LOCALE 'C.UTF-8' TEMPLATE template0" in finding.message
    finally:
        await cluster.drop_database(name)


def description(**fields: object) -> Description:
    """Return the description of a database without problems, but for some fields."""
    schema = SchemaState(SchemaVersion(tables.BUILD, 1))
    usual = Description("18.1", 18, "u", 100, False, "UTF8", None, 0.001, schema)
    return replace(usual, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [(4.0, None), (-4.0, None), (3600.0, "3600 s ahead of"), (-3600.0, "3600 s behind")],
)
def test_finding_on_clocks_that_differ(ahead_s: float, words: str | None) -> None:
    findings = diagnose(description(clock_ahead_s=ahead_s), parse("postgresql:///d"), POOL)
    messages = [finding.message for finding in findings if finding.subject == "clock"]
    assert len(messages) == (words is not None)
    assert all(str(words) in message for message in messages)


async def test_difference_of_the_clocks_is_measured(database_url: str) -> None:
    """Both are the clock of this machine."""
    assert abs((await describe(parse(database_url), 5.0)).clock_ahead_s) < 5


@pytest.mark.parametrize(("age_s", "verdict"), [(None, NOTE), (4.9, NOTE), (5.0, TODO)])
def test_lock_that_lasts_is_to_be_ended(age_s: float | None, verdict: Verdict) -> None:
    lock = TableLock("users", "AccessExclusiveLock", True, 7, "psql", age_s)
    schema = SchemaState(SchemaVersion(tables.BUILD, 1), table_lock=lock)
    findings = diagnose(description(schema=schema), parse("postgresql:///d"), POOL)
    assert select(findings, "locks").verdict is verdict


def test_standby_behind_a_pooler_is_reported() -> None:
    target = parse("postgresql://u@pooler:6432/d")
    findings = diagnose(description(is_standby=True, read_only=True), target, POOL)
    finding = select(findings, "connection")
    assert finding.verdict is TODO
    assert "a standby" in finding.message


# --- Several servers, addresses, and the disk.


async def run_check(start: Start, url: str, **environment: str) -> list[str]:
    """Run the command on a database; return the lines of its report."""
    command = start("check", DATABASE_URL=url, **environment)
    await asyncio.to_thread(command.wait)
    assert command.stderr == ""
    return command.stdout.splitlines()


@pytest.mark.case(n=502)
@pytest.mark.parametrize("is_url", [True, False], ids=["URL", "pairs"])
async def test_check_prints_a_line_for_each_server(
    start: Start, database_url: str, is_url: bool
) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        pairs = (
            f"host=127.0.0.1,127.0.0.1 port=1,{proxy.port} user=postgres sslmode=disable "
            f"dbname={database_name(database_url)}"
        )
        several = url.replace("@", f"@{UNUSED_ADDRESS},", 1) if is_url else pairs
        lines = await run_check(start, several)
    [refused, writable] = [line for line in lines if re.match(r"\w+ +server ", line)]
    assert re.search(f"note +server +{UNUSED_ADDRESS}: connection refused", refused)
    assert re.search(f"ok +server +{proxy.address}: writable", writable)
    assert any(re.match(r"ok +database ", line) for line in lines)


@pytest.mark.case(n=502)
async def test_check_prints_a_line_for_each_server_when_none_can_be_used(start: Start) -> None:
    url = f"postgresql://u@{UNUSED_ADDRESS},127.0.0.1:2/d"
    lines = await run_check(start, url)
    assert len([line for line in lines if re.match(r"note +server .*refused", line)]) == 2
    assert any("none of the servers in DATABASE_URL can be used" in line for line in lines)


@pytest.mark.case(n=522)
@pytest.mark.parametrize("name", ["LISTEN", "HEALTH_LISTEN", "METRICS_LISTEN"])
async def test_check_names_an_address_in_use_with_its_setting(
    start: Start, database_url: str, name: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        lines = await run_check(start, database_url, **{f"CHAT_HISTORY_{name}": address})
    [line] = [line for line in lines if re.match(r"\w+ +address ", line)]
    assert re.search(f"note +address +{address} is in use: stop .*CHAT_HISTORY_{name} to", line)
    lines = await run_check(start, database_url, **{f"CHAT_HISTORY_{name}": address})
    assert not [line for line in lines if re.match(r"\w+ +address ", line)]


@pytest.mark.case(n=512)
def test_option_that_a_pooler_would_lose_is_an_error_of_every_command(start: Start) -> None:
    url = "postgresql://u:s3cret@h/d?pgbouncer=true&options=-cstatement_timeout%3D5000"
    for name in ("check", "migrate", "serve"):
        command = start(name, DATABASE_URL=url)
        assert command.wait() == 2
        assert "statement_timeout in the options of the database URL cannot be sent through" in (
            command.stderr
        )
        assert "ALTER ROLE … SET" in command.stderr
        assert "s3cret" not in command.stderr


async def test_check_names_addresses_that_can_never_be_used(
    start: Start, database_url: str
) -> None:
    lines = await run_check(
        start,
        database_url,
        CHAT_HISTORY_LISTEN="127.0.0.1:12345",
        CHAT_HISTORY_HEALTH_LISTEN="127.0.0.1:12345",
        CHAT_HISTORY_METRICS_LISTEN="192.0.2.1:9464",
    )
    reported = "\n".join(line for line in lines if re.match(r"todo +address ", line))
    assert "CHAT_HISTORY_LISTEN and CHAT_HISTORY_HEALTH_LISTEN are both 127.0.0.1:12345" in reported
    assert "192.0.2.1:9464 is not an address of this machine: set CHAT_HISTORY_METRICS" in reported


@pytest.mark.case(n=505)
@pytest.mark.parametrize(
    ("free_bytes", "verdict"), [(2**31, None), (2**29, NOTE), (2**24, TODO), (0, TODO)]
)
def test_finding_on_the_disk_depends_on_its_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, verdict: Verdict | None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free_bytes))
    findings = check._check_disk(settings(data_dir=tmp_path / "not" / "yet"))
    assert findings == check_free_space(tmp_path, free_bytes)
    assert [finding.verdict for finding in findings] == ([] if verdict is None else [verdict])
    assert all("make room there" in finding.message for finding in findings)
    remote = settings(data_dir=tmp_path, search="off", DATABASE_URL="postgresql://u@h/d")
    assert check._check_disk(remote) == []
