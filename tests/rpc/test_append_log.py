"""A failed append leaves no content of a message or session in PostgreSQL's log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from chathistory.v1 import session_pb2
from grpc import StatusCode
from grpc.aio import AioRpcError

from tests.support.chat import Chat, new_id, new_message
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.failures import failure_of, read_failure
from tests.support.statements import database_name
from tests.support.untyped_messages import Part

SECRET = "xyzzy-7f3a9c-plugh"


class ServerLog:
    """The text that PostgreSQL has written to its log since this object was created."""

    def __init__(self, cluster: Cluster) -> None:
        self._path = cluster.postgres.log
        self._start = self._path.stat().st_size

    @property
    def text(self) -> str:
        with self._path.open("rb") as log:
            log.seek(self._start)
            return log.read().decode(errors="replace")


@pytest.fixture
async def log(cluster: Cluster, database_url: str) -> ServerLog:
    """Provide the log of a server that reports errors as an external one does by default."""
    # The embedded server may be configured to report less.
    name = database_name(database_url)
    await fetch(database_url, f"ALTER DATABASE {name} SET log_error_verbosity = 'default'")
    return ServerLog(cluster)


async def wait_for_lock(url: str) -> None:
    """Wait until a statement of the service waits for a lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(30), connected_to(url) as connection:
        while not await connection.fetchval(query):
            await asyncio.sleep(0.005)


async def test_append_to_session_that_is_deleted_concurrently_is_not_logged(
    log: ServerLog, chat: Chat, database_url: str
) -> None:
    session = await chat.create_session(title=SECRET)
    async with connected_to(database_url) as deleter:
        async with deleter.transaction():
            await deleter.execute(
                "DELETE FROM chat_sessions WHERE user_id = $1 AND id = $2",
                chat.user_id,
                session.id,
            )
            append = asyncio.create_task(failure_of(chat.append(session.id, SECRET)))
            await wait_for_lock(database_url)
        assert (await append).reason == "SESSION_NOT_FOUND"
    assert SECRET not in log.text
    assert "ERROR:  division by zero" in log.text, "the statement did not meet the deletion"


async def test_appends_racing_deletions_are_not_logged(log: ServerLog, chat: Chat) -> None:
    for _ in range(10):
        sessions = [await chat.create_session(title=SECRET) for _ in range(4)]
        calls: list[Awaitable[str | None]] = []
        for session in sessions:
            calls += [reason_of(chat.append(session.id, SECRET)) for _ in range(4)]
            calls.append(reason_of(chat.delete_session(session.id)))
        assert set(await asyncio.gather(*calls)) <= {None, "SESSION_NOT_FOUND", "CONTENTION"}
    assert SECRET not in log.text


async def reason_of(call: Awaitable[Any]) -> str | None:
    """Return why a call failed, or None."""
    try:
        await call
    except AioRpcError as error:
        return read_failure(error).reason
    return None


async def test_append_for_missing_user_is_not_logged(
    log: ServerLog, chat: Chat, database_url: str
) -> None:
    await fetch(database_url, "DELETE FROM users WHERE id = $1", chat.user_id)
    reply = await failure_of(
        chat.append("", SECRET, session=session_pb2.Session(title=SECRET, summary=SECRET))
    )
    assert reply.reason == "USER_NOT_FOUND"
    assert "chat_sessions_user_id_fkey" in log.text
    assert SECRET not in log.text


async def test_append_with_reused_message_id_is_not_logged(
    log: ServerLog, chat: Chat, session: session_pb2.Session
) -> None:
    message = new_message(SECRET)
    await chat.append(session.id, [message])
    message.content = f"other {SECRET}"
    failure = await failure_of(chat.append(session.id, [message]))
    assert failure.reason == "MESSAGE_ID_REUSED"
    assert "chat_messages_user_id_session_id_id_key" in log.text
    assert SECRET not in log.text


NUL = f"{SECRET}\0"
WITH_NUL: dict[str, dict[str, Any]] = {
    "content": {"content": NUL},
    "author": {"author": NUL},
    "metadata value": {"metadata": {"a": NUL}},
    "metadata key": {"metadata": {NUL: 1}},
    "nested metadata": {"metadata": {"a": [{"b": [NUL]}]}},
    "feedback": {"feedback": {"comment": NUL}},
    "text": {"parts": [Part(text=NUL)]},
    "tool call id": {"parts": [Part(tool_call={"id": NUL, "name": "a"})]},
    "tool call name": {"parts": [Part(tool_call={"id": "a", "name": NUL})]},
    "arguments": {"parts": [Part(tool_call={"id": "a", "name": "a", "arguments": NUL})]},
    "result id": {"parts": [Part(tool_result={"tool_call_id": NUL})]},
    "result": {"parts": [Part(tool_result={"tool_call_id": "a", "content": NUL})]},
    "file uri": {"parts": [Part(file={"uri": NUL})]},
    "file type": {"parts": [Part(file={"uri": "a", "mime_type": NUL})]},
    "file name": {"parts": [Part(file={"uri": "a", "name": NUL})]},
    "quote": {"parts": [Part(citation={"document_id": new_id(), "quote": NUL})]},
    "data value": {"parts": [Part(data={"a": NUL})]},
    "data key": {"parts": [Part(data={NUL: 1})]},
}


@pytest.mark.parametrize("fields", WITH_NUL.values(), ids=WITH_NUL.keys())
async def test_value_that_jsonb_rejects_never_reaches_the_database(
    log: ServerLog, chat: Chat, session: session_pb2.Session, fields: dict[str, Any]
) -> None:
    """PostgreSQL reports a value of jsonb that it rejects with an excerpt of the text."""
    message = new_message(**({"content": "hello"} | fields))
    failure = await failure_of(chat.append(session.id, [message]))
    assert failure.code is StatusCode.INVALID_ARGUMENT
    assert "ERROR:" not in log.text
    assert SECRET not in log.text
