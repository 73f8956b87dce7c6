"""The command `move-schema`."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.store import tables
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.cli.conftest import Start
from tests.support.cluster import tables_in

COUNT = len(tables.metadata.tables) + 1
"""Number of tables, with that of the revision."""


async def test_command_moves_the_tables_and_then_has_nothing_to_do(
    start: Start, empty_database_url: str
) -> None:
    await migrations.upgrade(replace(parse(empty_database_url), schema="public"))
    for words in (
        f"moved {COUNT} tables from public to chathistory",
        "nothing to do: the tables are in the schema chathistory",
    ):
        command = start("move-schema", "chathistory", DATABASE_URL=empty_database_url)
        assert await asyncio.to_thread(command.wait) == 0, command.stderr
        assert words in command.stderr
    assert len(await tables_in(empty_database_url, "chathistory")) == COUNT
    assert await tables_in(empty_database_url, "public") == set()


@pytest.mark.parametrize("name", ["pg_other", "Upper", "a-b", "information_schema"])
def test_name_of_no_schema_is_refused(start: Start, name: str) -> None:
    command = start("move-schema", name, DATABASE_URL="postgresql://user@127.0.0.1:1/database")
    assert command.wait() == 2
    assert "is not the name of a schema" in command.stderr
