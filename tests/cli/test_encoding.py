"""Databases whose encoding cannot store every text are refused, with the command that helps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from chathistory.v1 import user_pb2

from service.doctor import Pool, Verdict, describe, diagnose
from service.server import Server
from service.store.db.dsn import parse
from service.store.schema import migrations
from service.store.schema.migrations import MigrationError
from tests.cli.conftest import Start
from tests.support.cluster import Cluster, tables_in
from tests.support.failures import assert_fails
from tests.support.servers import connected, settings
from tests.support.waits import until

pytestmark = [pytest.mark.faults, pytest.mark.case(n=515)]

NAME = "encoded"
COMMAND = f"CREATE DATABASE {NAME}_utf8 ENCODING 'UTF8'"


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
async def encoding(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncGenerator[str]:
    """Create the database of an encoding, and provide the encoding."""
    connection = await cluster.connect()
    try:
        await connection.execute(
            f"CREATE DATABASE {NAME} TEMPLATE template0 ENCODING '{request.param}'"
            " LOCALE_PROVIDER libc LOCALE 'C'"
        )
    finally:
        await connection.close()
    yield str(request.param)
    await cluster.drop_database(NAME)


@pytest.fixture
def url(cluster: Cluster, encoding: str) -> str:
    """Return the connection string of the database."""
    return cluster.url(NAME)


async def test_migrate_refuses_the_encoding(encoding: str, url: str) -> None:
    with pytest.raises(MigrationError, match=f"has the encoding {encoding}.*{COMMAND}"):
        await migrations.upgrade(parse(url))
    assert await tables_in(url, "chathistory") == set()


async def test_service_reports_the_encoding_and_serves_nothing(encoding: str, url: str) -> None:
    server = Server(settings(), parse(url))
    await server.start()
    try:
        await until(lambda: encoding in server.readiness.problem)
        assert COMMAND in server.readiness.problem
        async with connected(server.address) as stub:
            call = stub.ListUsers(user_pb2.ListUsersRequest(), timeout=3)
            await assert_fails(call, "DATABASE_UNAVAILABLE")
    finally:
        await server.stop()


async def test_serve_exits_with_the_command_that_helps(
    start: Start, encoding: str, url: str
) -> None:
    command = start("serve", DATABASE_URL=url)
    assert await asyncio.to_thread(command.wait) == 1
    assert f"has the encoding {encoding}" in command.stderr
    assert COMMAND in command.stderr


async def test_check_names_the_command_that_helps(encoding: str, url: str) -> None:
    description = await describe(parse(url), 5.0)
    findings = {
        finding.subject: finding
        for finding in diagnose(description, parse(url), Pool(8, 4, 240, 12))
    }
    assert findings["encoding"].verdict is Verdict.TODO
    assert f"has the encoding {encoding}" in findings["encoding"].message
