"""PostgreSQL's log holds no content of users, whatever fails, with default settings of the log."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from chathistory.v1 import user_pb2
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from grpc import aio

from service.server import Server
from service.store import messages, sessions
from tests.rpc import test_validation
from tests.search.library import LEXICAL, Library
from tests.security import provocations
from tests.security.provocations import PROVOCATIONS, SECRET, WRITERS, Scene
from tests.support.chat import Chat, new_id
from tests.support.logged_postgres import KINDS, LoggedPostgres, logged_postgres
from tests.support.servers import AsyncStub, serving

pytestmark = pytest.mark.quick

MIN_RACES, MAX_RACES = 12, 100
# Every constraint of the tables, and every column that must have a value.
CONSTRAINTS = """
SELECT conrelid::regclass::text, conname::text
FROM pg_constraint
WHERE connamespace = 'chathistory'::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')
UNION
SELECT indrelid::regclass::text, i.relname::text
FROM pg_index JOIN pg_class AS i ON i.oid = indexrelid
WHERE indisunique AND i.relnamespace = 'chathistory'::regnamespace
"""
REQUIRED_COLUMNS = """
SELECT c.relname::text, a.attname::text
FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
WHERE c.relnamespace = 'chathistory'::regnamespace AND c.relkind IN ('r', 'p')
  AND a.attnum > 0 AND a.attnotnull AND NOT a.attisdropped
ORDER BY c.relname, a.attnum
"""


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


@pytest.fixture
async def scene(
    server: Server, stub: AsyncStub, chat: Chat, postgres: LoggedPostgres
) -> AsyncGenerator[Scene]:
    async with postgres.connected() as connection:
        yield Scene(server, stub, chat, connection)


async def test_every_constraint_is_provoked_without_logging_a_row(scene: Scene) -> None:
    names = {
        name
        for table, name in await scene.connection.fetch(CONSTRAINTS)
        if table not in provocations.NO_USER_DATA
    }
    provoked = {name for names in PROVOCATIONS.values() for name in names}
    assert names - provoked == set(), "write a provocation for the new constraint"
    for provoke in PROVOCATIONS:
        await provoke(scene)


async def test_missing_values_are_refused_without_logging_a_row(scene: Scene) -> None:
    count = 0
    for table, column in await scene.connection.fetch(REQUIRED_COLUMNS):
        if table not in provocations.NO_USER_DATA:
            assert table in WRITERS, "write a writer for the new table"
            await WRITERS[table](scene, column)
            count += 1
    assert count > 30


async def test_values_that_postgresql_rejects_are_not_logged(scene: Scene) -> None:
    """The store refuses these values, or PostgreSQL's error does not quote them."""
    user_id = scene.chat.user_id
    session_id = await scene.session()
    message, *_ = await scene.chat.all(session_id)
    texts = (f"{SECRET}\0", f"{SECRET}\ud800", 7, SECRET.encode(), [SECRET])
    objects: tuple[Any, ...] = (
        {SECRET: math.nan},
        {SECRET: [math.inf, SECRET]},
        {f"{SECRET}\0": 1},
        {SECRET: f"{SECRET}\0"},
        {f"\ud800{SECRET}": 1},
        {SECRET: f"\udfff{SECRET}"},
        {SECRET: {1, 2}},
    )
    changes = [{"title": text} for text in texts] + [{"metadata": value} for value in objects]
    changes += [{"state": SECRET}, {"state": 2**40}, {"summarized_through_seq": 2**70}]
    for change in changes:
        values = {"user_id": user_id, "id": new_id(), "summary": SECRET, "fingerprint": b""}
        await fails(scene, sessions.create, values | change)
        await fails(scene, sessions.update, user_id, session_id, change, "")
    for text in (json.dumps(value) for value in objects[:-1]):
        for column in ("parts", "metadata"):
            change = {column: text}
            arguments = (user_id, session_id, message.id, change, "", provocations.measure)
            await fails(scene, messages.update, *arguments)
    for id_ in (SECRET, f"{SECRET}\0", ""):
        await fails(scene, sessions.get, user_id, id_)


async def fails(scene: Scene, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Assert that a function of the store fails; its error does not matter."""
    try:
        await scene.write(function, *args)
    except Exception:  # noqa: BLE001
        return
    pytest.fail(f"{function} accepted {args}")


def hostile_requests() -> Iterator[tuple[str, Message]]:
    """Yield requests whose texts hold the secret, each with one hostile field."""
    for name, valid in test_validation.requests().items():
        paths = list(test_validation.strings_in(valid))
        for path in paths:
            value = test_validation.at_path(valid, path)
            if isinstance(value, Struct):
                test_validation.put(valid, path, {SECRET: [SECRET]})
            elif not path.endswith("id") and "email" not in path and value != "e":
                test_validation.put(valid, path, SECRET)
        for path in paths:
            values: tuple[Any, ...] = (SECRET, f"{SECRET}\0", SECRET + "\U0001f600" * 300)
            if isinstance(test_validation.at_path(valid, path), Struct):
                values = ({SECRET: 1e308}, {f"{SECRET}\0": 1}, {SECRET: math.nan})
            for value in values:
                request = type(valid)()
                request.CopyFrom(valid)
                yield name, test_validation.put(request, path, value)


async def test_hostile_requests_are_not_logged(scene: Scene) -> None:
    count = 0
    for name, request in hostile_requests():
        if "user_id" in request.DESCRIPTOR.fields_by_name:
            request.user_id = scene.chat.user_id  # type: ignore[attr-defined]
        await test_validation.outcome(scene.stub, name, request)
        count += 1
    assert count > 150
    for query in (SECRET, f"{SECRET}\0", f"'{SECRET}':* & (", "a" * 5000 + SECRET, f"-{SECRET}"):
        with suppress(aio.AioRpcError):
            await scene.library.search_messages(query[:4000], mode=LEXICAL)


async def test_races_are_not_logged(scene: Scene, postgres: LoggedPostgres) -> None:
    """Deletions race with every write; foreign keys, locks and deadlocks are the errors."""
    chat, library = scene.chat, scene.library
    start = postgres.log_bytes()
    for number in range(MAX_RACES):
        if number >= MIN_RACES and "ERROR:" in postgres.read_log(start):
            return
        session_id = await scene.session()
        document = await library.create([SECRET], title=SECRET, source_uri=f"{SECRET}/{number}")
        other = await Chat.of_new_user(scene.stub)
        calls: list[Awaitable[Any]] = [
            *(chat.append(session_id, [provocations.secret_message()]) for _ in range(6)),
            chat.update_session(id=session_id, title=SECRET, metadata={SECRET: SECRET}),
            chat.fork(session_id, 2),
            chat.delete_session(session_id),
            library.append(document.id, 1, [SECRET]),
            library.update(id=document.id, title=f"new {SECRET}"),
            library.delete(document.id),
            other.create_session(title=SECRET),
            *(other.start([provocations.secret_message()]) for _ in range(4)),
            Library(other).create([SECRET], title=SECRET),
            scene.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=other.user_id)),
        ]
        random.Random(number).shuffle(calls)
        await asyncio.gather(*calls, return_exceptions=True)
    pytest.fail("PostgreSQL has reported no error: no race was lost")


async def test_embedded_server_logs_neither_rows_nor_parameters(cluster: object) -> None:
    """Also a statement with a defect must not reveal content there."""
    with logged_postgres("embedded") as postgres:
        connection = await asyncpg.connect(postgres.admin_url)
        try:
            await connection.execute("CREATE TEMPORARY TABLE t (a text NOT NULL, b text UNIQUE)")
            await connection.execute("SET log_min_duration_statement = 0")
            await connection.execute("INSERT INTO t VALUES ($1, $1)", SECRET)
            for values in ((SECRET, SECRET), (None, SECRET)):
                with pytest.raises(asyncpg.IntegrityConstraintViolationError):
                    await connection.execute("INSERT INTO t VALUES ($1, $2)", *values)
            with pytest.raises(asyncpg.DataError):
                await connection.fetch("SELECT $1::text::jsonb", f'{{"{SECRET}": NaN}}')
        finally:
            await connection.close()
        log = postgres.read_log()
        assert "duplicate key value" in log
        assert "null value in column" in log
        assert "invalid input syntax for type json" in log
        assert "INSERT INTO t VALUES ($1, $1)" in log
        assert_secret_is_not_in(log)
