"""The migrations produce the schema of service/store/tables.py, up and down."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from service.ids import SYSTEM_USER_ID
from service.store import tables
from service.store.db.dsn import Target, parse
from service.store.schema import migrations
from tests.support.cluster import OWN_SETTINGS, fetch

# The parts of a schema in the catalog, as text that does not depend on the order of creation.
_CATALOG = {
    "tables": """
        SELECT relname, relkind::text, relpersistence::text, reloptions::text, relrowsecurity
        FROM pg_class
        WHERE relnamespace = to_regnamespace('chathistory')
          AND relkind IN ('r', 'p', 'v', 'm', 'S', 'f')""",
    "columns": """
        SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, attidentity::text,
               attgenerated::text, attcollation::regcollation::text, attstorage::text,
               attcompression::text, attstattarget, pg_get_expr(adbin, adrelid)
        FROM pg_attribute
        JOIN pg_class c ON c.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = to_regnamespace('chathistory') AND relkind IN ('r', 'p')
          AND attnum > 0 AND NOT attisdropped""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated
        FROM pg_constraint WHERE connamespace = to_regnamespace('chathistory')""",
    "indexes": """
        SELECT indrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid, indisunique
        FROM pg_index JOIN pg_class c ON c.oid = indexrelid
        WHERE relnamespace = to_regnamespace('chathistory')""",
    "functions": """
        SELECT pg_get_functiondef(oid) FROM pg_proc
        WHERE pronamespace = to_regnamespace('chathistory')""",
    "triggers": "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    "types": """
        SELECT typname FROM pg_type
        WHERE typnamespace = to_regnamespace('chathistory') AND typtype IN ('e', 'd')""",
    "extensions": "SELECT extname FROM pg_extension",
}


async def read_catalog(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Read the schema of a database, without Alembic's own table."""
    catalog = {
        kind: [tuple(row) for row in await fetch(url, query)] for kind, query in _CATALOG.items()
    }
    return {
        kind: sorted((row for row in rows if row[0] != "alembic_version"), key=repr)
        for kind, rows in catalog.items()
    }


def url_of(target: Target) -> str:
    return target.url.set(drivername="postgresql").render_as_string(hide_password=False)


async def test_the_migrated_schema_equals_the_metadata(
    empty: Target, other_database_url: str
) -> None:
    await migrations.upgrade(empty)
    await fetch(other_database_url, "CREATE SCHEMA chathistory")
    engine = create_async_engine(
        parse(other_database_url).url,
        poolclass=NullPool,
        connect_args={"server_settings": OWN_SETTINGS | {"search_path": "chathistory"}},
    )
    async with engine.begin() as connection:
        await connection.run_sync(tables.metadata.create_all)
    await engine.dispose()
    migrated = await read_catalog(url_of(empty))
    created = await read_catalog(other_database_url)
    assert len(created["tables"]) == len(tables.metadata.tables)
    for kind, rows in created.items():
        assert migrated[kind] == rows, kind


async def test_alembic_finds_no_difference(empty: Target) -> None:
    differences: list[Any] = []

    def compare(connection: Connection) -> None:
        options = {"compare_type": True, "compare_server_default": True}
        differences.extend(
            compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
        )

    await migrations.upgrade(empty)
    await migrations.in_transaction(empty, compare)
    assert differences == []


async def test_each_migration_goes_up_down_and_up_again(empty: Target) -> None:
    url = url_of(empty)
    empty_catalog = await read_catalog(url)
    stages = []
    await migrations.upgrade(empty)
    for revision in reversed(revisions()):
        stages.append(await read_catalog(url))
        result = await migrations.downgrade(empty, "-1")
        assert (result.before, result.after) == (int(revision), int(revision) - 1)
    assert await read_catalog(url) == empty_catalog
    for stage in reversed(stages):
        await migrations.in_transaction(
            empty, lambda connection: migrations.run_alembic(connection, "upgrade", "+1")
        )
        assert await read_catalog(url) == stage


async def test_a_new_schema_holds_its_version_and_the_system_user(empty: Target) -> None:
    result = await migrations.upgrade(empty)
    assert (result.before, result.after, result.problem) == (0, tables.BUILD, None)
    assert str(result) == f"migrated the schema from nothing to revision {tables.BUILD:04d}"
    assert [tuple(row) for row in await fetch(url_of(empty), "SELECT * FROM schema_info")] == [
        (1, 1)
    ]
    [user] = await fetch(
        url_of(empty), "SELECT id::text, fingerprint, email, external_id, name FROM users"
    )
    assert tuple(user) == (SYSTEM_USER_ID, b"", None, None, "")


def revisions() -> list[str]:
    config = Config()
    config.set_main_option("script_location", str(migrations.SCRIPTS_DIR))
    config.set_main_option("path_separator", "os")
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][
        ::-1
    ]


def test_revisions_are_consecutive_and_the_build_is_the_last() -> None:
    assert revisions() == [f"{number:04d}" for number in range(1, tables.BUILD + 1)]
    assert 1 <= tables.REQUIRED_REVISION <= tables.BUILD
