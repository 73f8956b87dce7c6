"""PostgreSQL's log holds no content of users, whatever fails, with default settings of the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

import asyncpg
import pytest
from chathistory.v1 import user_pb2

from service.server import Server
from tests.search.library import Library
from tests.support.chat import Chat, new_id
from tests.support.failures import assert_fails
from tests.support.logged_postgres import KINDS, LoggedPostgres, logged_postgres
from tests.support.servers import AsyncStub, serving

pytestmark = pytest.mark.quick

SECRET = "xyzzy-7f3a9c-plugh"
SHA256 = "ab" * 32


@pytest.fixture(scope="module", params=KINDS)
def postgres(request: pytest.FixtureRequest, cluster: object) -> Generator[LoggedPostgres]:
    """Provide a server, to which the tests of this module connect as an ordinary role."""
    with logged_postgres(request.param) as postgres:
        asyncio.run(postgres.prepare())
        yield postgres


@pytest.fixture
async def server(postgres: LoggedPostgres) -> AsyncGenerator[Server]:
    """Provide the service on that server; afterwards the log must not hold the secret."""
    start = postgres.log_bytes()
    async with serving(postgres.url) as server:
        yield server
    assert_secret_is_not_in(postgres.read_log(start))


def assert_secret_is_not_in(log: str) -> None:
    lines = log.splitlines()
    positions = [index for index, line in enumerate(lines) if SECRET in line]
    context = "\n".join(lines[max(0, positions[0] - 2) : positions[0] + 3]) if positions else ""
    assert not positions, f"{len(positions)} lines hold the secret, the first one here:\n{context}"


async def test_the_log_is_read_and_holds_rows_of_failed_statements(
    postgres: LoggedPostgres,
) -> None:
    """Without this, the other tests could pass because they read the wrong file."""
    marker = f"control-{new_id()}"
    async with postgres.connected() as connection:
        with pytest.raises(asyncpg.NotNullViolationError):
            await connection.execute(
                "INSERT INTO users (id, name) VALUES ($1, $2)", new_id(), marker
            )
        assert not await connection.fetchval(
            "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
        )
    assert "Failing row contains" in postgres.read_log()
    assert marker in postgres.read_log()


async def test_taken_values_of_users_are_not_logged(stub: AsyncStub) -> None:
    async def create(**fields: Any) -> user_pb2.User:
        request = user_pb2.CreateUserRequest(user=user_pb2.User(**fields))
        return (await stub.CreateUser(request)).user

    async def update(**fields: Any) -> None:
        await stub.UpdateUser(user_pb2.UpdateUserRequest(user=user_pb2.User(**fields)))

    email = f"{SECRET}@example.com"
    await create(email=email, external_id=SECRET)
    other = await create(email=f"other-{email}", external_id=f"other-{SECRET}")
    await assert_fails(create(email=email.upper()), "EMAIL_TAKEN")
    await assert_fails(create(external_id=SECRET), "EXTERNAL_ID_TAKEN")
    await assert_fails(create(id=other.id, email=email), "ID_TAKEN")
    await assert_fails(update(id=other.id, email=email.upper()), "EMAIL_TAKEN")
    await assert_fails(update(id=other.id, external_id=SECRET), "EXTERNAL_ID_TAKEN")


async def test_taken_content_of_documents_is_not_logged(chat: Chat) -> None:
    library = Library(chat)
    await library.create(source_uri=SECRET, content_sha256=SHA256)
    other = await library.create(source_uri=f"other-{SECRET}", content_sha256=SHA256)
    await assert_fails(library.update(id=other.id, source_uri=SECRET), "ID_TAKEN")
    await assert_fails(library.create(id=other.id, source_uri="x"), "ID_TAKEN")
    assert (await library.create(source_uri=SECRET, content_sha256=SHA256)).id != other.id
