"""Appends to sessions whose rows other transactions hold: with weak locks, or to delete them."""

import asyncio

import asyncpg
import pytest

from service.server import Server
from tests.support import failures
from tests.support.chat import Chat
from tests.support.cluster import OWN_SETTINGS


@pytest.mark.parametrize("ended", [0, 1, 2])
async def test_append_under_key_share_locks_reports_no_created_session(
    chat: Chat, database_url: str, ended: int
) -> None:
    """Each foreign key check takes such a lock, which must not make the session look new."""
    session = await chat.create_session()
    connections = [
        await asyncpg.connect(database_url, server_settings=OWN_SETTINGS) for _ in range(2)
    ]
    held = []
    for connection in connections:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "SELECT FROM chat_sessions WHERE user_id = $1 AND id = $2 FOR KEY SHARE",
            chat.user_id,
            session.id,
        )
        held.append(transaction)
    for transaction in held[:ended]:
        await transaction.rollback()
    reply = await chat.append(session.id, "hello")
    for transaction in held[ended:]:
        await transaction.rollback()
    for connection in connections:
        await connection.close()
    assert [entry.seq for entry in reply.messages] == [1]
    assert not reply.session_created


async def test_append_that_waits_for_a_delete_is_not_found(chat: Chat, database_url: str) -> None:
    """A large delete holds the lock for longer than an attempt waits: there are many attempts."""
    session = await chat.create_session()
    deleter = await asyncpg.connect(database_url, server_settings=OWN_SETTINGS)
    async with deleter.transaction():
        await deleter.execute(
            "DELETE FROM chat_sessions WHERE user_id = $1 AND id = $2", chat.user_id, session.id
        )
        waiting = [
            asyncio.create_task(failures.failure_of(chat.append(session.id, f"{n}")))
            for n in range(3)
        ]
        await asyncio.sleep(2)  # Each attempt waits up to 75 ms for the lock.
    await deleter.close()
    assert {failure.reason for failure in await asyncio.gather(*waiting)} == {"SESSION_NOT_FOUND"}


async def test_deleted_session_takes_its_next_appends_apart(chat: Chat, server: Server) -> None:
    """A shared statement would wait for the deletion with the appends of other users."""
    deleted, other = await chat.create_session(), await chat.create_session()
    await chat.delete_session(deleted.id)
    contention = server.appender.contention
    assert contention.covers((chat.user_id, deleted.id))
    assert not contention.covers((chat.user_id, other.id))
