"""The schema of the tables: found by their columns, created for a new database, moved on request.

The names of the tests' schemas begin with `chat`, so that the sentinel knows the tables in them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import pytest

from service.doctor import Pool, Verdict, describe, diagnose
from service.store import tables
from service.store.db.dsn import Target, parse
from service.store.schema import migrations, moving
from service.store.schema.location import SIGNATURE
from service.store.schema.migrations import MigrationError
from tests.migration.test_schema import url_of
from tests.support import pgbouncer
from tests.support.chat import Chat
from tests.support.cluster import Cluster, execute, fetch, tables_in
from tests.support.failures import failure_of
from tests.support.pgbouncer import PgBouncer
from tests.support.servers import connected, serving
from tests.support.statements import database_name
from tests.support.tools import skip_or_fail
from tests.support.waits import until

OURS = {*tables.metadata.tables, "alembic_version"}
FIRST_RELEASE = "0003"
"""The newest revision of the release 0.1.0, which knew `search_path` only."""
APPLICATION = """
CREATE TABLE users (id serial PRIMARY KEY, email text UNIQUE);
INSERT INTO users (email) VALUES ('someone@example.com');
CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
INSERT INTO alembic_version VALUES ('0001');
"""
"""The tables of another application, whose Alembic numbers its revisions as ours does."""


async def install_first_release(target: Target, schema: str) -> None:
    """Create the tables as the release 0.1.0 did."""
    await migrations.in_transaction(
        replace(target, schema=schema),
        lambda connection: migrations.run_alembic(connection, "upgrade", FIRST_RELEASE),
    )


async def append_on(target: str | Target) -> str:
    """Serve a database, append a message and read it; return the user's id."""
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        assert [message.seq for message in await chat.all(session_id)] == [1]
        return chat.user_id


async def users_of_sessions(url: str, schema: str) -> list[str]:
    """Return the users who have sessions in a schema."""
    rows = await fetch(url, f'SELECT user_id::text FROM "{schema}".chat_sessions')
    return [row["user_id"] for row in rows]


async def test_new_database_gets_a_schema_of_its_own(empty: Target) -> None:
    result = await migrations.upgrade(empty)
    assert (result.before, result.after, result.note) == (0, tables.BUILD, None)
    assert await tables_in(url_of(empty), "chathistory") == OURS
    assert await tables_in(url_of(empty), "public") == set()
    await append_on(url_of(empty))


@pytest.mark.faults
@pytest.mark.case(n=513)
async def test_tables_of_an_application_with_our_names_are_unchanged(empty: Target) -> None:
    await execute(url_of(empty), APPLICATION)
    result = await migrations.upgrade(empty)
    assert (result.before, result.after, result.problem) == (0, tables.BUILD, None)
    assert await tables_in(url_of(empty), "public") == {"users", "alembic_version"}
    assert await tables_in(url_of(empty), "chathistory") == OURS
    [[version]] = await fetch(url_of(empty), "SELECT version_num FROM public.alembic_version")
    [[email]] = await fetch(url_of(empty), "SELECT email FROM public.users")
    assert (version, email) == ("0001", "someone@example.com")
    await append_on(url_of(empty))


@pytest.mark.faults
@pytest.mark.case(n=513)
async def test_schema_with_tables_of_an_application_is_refused_and_unchanged(
    empty: Target,
) -> None:
    await execute(url_of(empty), APPLICATION)
    with pytest.raises(
        MigrationError,
        match="holds alembic_version, users of another application: set CHAT_HISTORY_DB_SCHEMA",
    ):
        await migrations.upgrade(replace(empty, schema="public"))
    assert await tables_in(url_of(empty), "public") == {"users", "alembic_version"}
    assert await tables_in(url_of(empty), "chathistory") == set()


@pytest.mark.faults
@pytest.mark.case(n=513)
async def test_migration_that_does_not_reach_its_revision_commits_nothing(
    empty: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        migrations,
        "_upgrade",
        lambda connection: migrations.run_alembic(connection, "upgrade", "0001"),
    )
    with pytest.raises(MigrationError, match="rolled back"):
        await migrations.upgrade(empty)
    assert await tables_in(url_of(empty), "chathistory") == set()


@pytest.mark.parametrize("schema", ["public", "chat", "chat-1"])
async def test_tables_of_the_first_release_stay_where_they_are(empty: Target, schema: str) -> None:
    """Wherever the `search_path` of its role has put them, which a pooler does not take."""
    await install_first_release(empty, schema)
    result = await migrations.upgrade(empty)
    assert (result.before, result.after) == (int(FIRST_RELEASE), tables.BUILD)
    assert await tables_in(url_of(empty), schema) == OURS
    assert await tables_in(url_of(empty), "chathistory") == set()
    user_id = await append_on(url_of(empty))
    assert await users_of_sessions(url_of(empty), schema) == [user_id]


async def test_two_installations_share_a_database(empty: Target) -> None:
    first, second = (replace(empty, schema=name) for name in ("chat_one", "chat_two"))
    # One after the other: Alembic has one migration for each process.
    results = [await migrations.upgrade(target) for target in (first, second)]
    assert {result.after for result in results} == {tables.BUILD}
    for target in (first, second):
        user_id = await append_on(target)
        assert await users_of_sessions(url_of(empty), str(target.schema)) == [user_id]
    with pytest.raises(MigrationError, match=r"chat_one, chat_two.*set CHAT_HISTORY_DB_SCHEMA"):
        await migrations.upgrade(empty)


async def test_second_installation_is_noted(empty: Target) -> None:
    await migrations.upgrade(empty)
    note = (await migrations.upgrade(replace(empty, schema="chat_two"))).note
    assert note is not None
    assert "another installation in the schema chathistory" in note


@pytest.fixture
def pooler(cluster: Cluster) -> Generator[PgBouncer]:
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    with PgBouncer(cluster.url("postgres")) as pooler:
        yield pooler


@pytest.mark.faults
@pytest.mark.case(n=512)
@pytest.mark.parametrize("option", ["options=-csearch_path%3Dchat", "search_path=chat"])
@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "pooled"])
async def test_search_path_of_the_url_names_the_schema(
    pooler: PgBouncer, empty: Target, option: str, is_pooled: bool
) -> None:
    direct = url_of(empty)
    url = pooler.url(database_name(direct)) if is_pooled else direct
    target = parse(f"{url}&{option}")
    assert (target.schema, target.is_pooled) == ("chat", is_pooled)
    await migrations.upgrade(target)
    assert await tables_in(direct, "chat") == OURS
    assert await tables_in(direct, "public") == set()
    user_id = await append_on(target)
    assert await users_of_sessions(direct, "chat") == [user_id]


async def test_move_takes_the_rows_and_the_rights_along(empty: Target) -> None:
    url = url_of(empty)
    await install_first_release(empty, "public")
    await migrations.upgrade(empty)
    user_id = await append_on(url)
    await execute(url, "CREATE ROLE chat_reader; GRANT SELECT ON public.users TO chat_reader")
    try:
        moved = await moving.move(empty, "chathistory")
        assert (moved.source, moved.table_count) == ("public", len(OURS))
        assert await tables_in(url, "public") == set()
        assert await users_of_sessions(url, "chathistory") == [user_id]
        [[may_use]] = await fetch(
            url, "SELECT has_schema_privilege('chat_reader', 'chathistory', 'USAGE')"
        )
        assert may_use
        assert "nothing to do" in str(await moving.move(empty, "chathistory"))
        assert (await migrations.upgrade(empty)).before == tables.BUILD
        await append_on(url)
    finally:
        await execute(url, "DROP OWNED BY chat_reader; DROP ROLE chat_reader")


async def test_move_is_refused_while_a_service_is_connected(database_url: str) -> None:
    async with serving(database_url):
        with pytest.raises(MigrationError, match="stop the services first"):
            await moving.move(parse(database_url), "chat_moved")
    assert await tables_in(database_url, "chat_moved") == set()
    assert await tables_in(database_url, "chathistory") == OURS


async def test_move_into_a_schema_with_tables_of_an_application_is_refused(
    empty: Target,
) -> None:
    await migrations.upgrade(empty)
    await execute(url_of(empty), APPLICATION)
    with pytest.raises(MigrationError, match="users of another application"):
        await moving.move(empty, "public")
    assert await tables_in(url_of(empty), "chathistory") == OURS


@pytest.mark.faults
@pytest.mark.case(n=518)
async def test_running_service_finds_tables_that_were_moved(database_url: str) -> None:
    """A downgrade makes it NOT_SERVING with the reason, and a migration SERVING again."""
    target = parse(database_url)
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await moving.move(target, "chat_moved", force=True)
        await failure_of(chat.append(session_id, "to the schema before"))
        server.readiness.request_probe()
        await until(lambda: server.database.locator.schema == "chat_moved")
        await chat.append(session_id, "after the move")
        assert [message.seq for message in await chat.all(session_id)] == [1, 2]
        await migrations.downgrade(target)
        server.readiness.request_probe()
        await until(lambda: not server.readiness.is_ready)
        assert "migrate" in server.readiness.problem
        await migrations.upgrade(replace(target, schema="chat_moved"))
        await until(lambda: server.readiness.is_ready)
        await Chat.of_new_user(stub)


def test_columns_that_identify_our_tables_exist_since_the_first_migration() -> None:
    [path] = (migrations.SCRIPTS_DIR / "versions").glob("0001_*.py")
    first = path.read_text()
    for table, column in SIGNATURE:
        assert column in tables.metadata.tables[table].c
        assert f'"{column}"' in first.partition(f'"{table}"')[2]


async def test_check_names_the_schema_and_the_command_that_moves_it(empty: Target) -> None:
    for schema, verdict, words in (
        ("chathistory", Verdict.OK, f"revision {tables.BUILD:04d} in chathistory"),
        ("public", Verdict.NOTE, "`chat-history move-schema chathistory`"),
    ):
        target = replace(empty, schema=schema)
        await migrations.upgrade(target)
        findings = diagnose(await describe(target, 5.0), target, Pool(8, 4, 240, 12))
        [finding] = [finding for finding in findings if finding.subject == "schema"]
        assert finding.verdict is verdict
        assert words in finding.message
