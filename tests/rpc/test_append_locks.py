"""Weak locks of others on a session's row, as every foreign key check takes them, do not make the session look new."""

import asyncio

import asyncpg
import pytest

from tests.support import failures
from tests.support.chat import Chat


@pytest.mark.parametrize("ended", [0, 1, 2])
async def test_append_waits_for_the_locks_of_other_transactions(
    chat: Chat, database_url: str, ended: int
) -> None:
    session = await chat.create_session()
    connections = [await asyncpg.connect(database_url) for _ in range(2)]
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
    assert [each.seq for each in reply.messages] == [1]
    assert not reply.session_created


async def test_append_that_waits_for_a_delete_is_not_found(chat: Chat, database_url: str) -> None:
    """However often it had to ask while the lock was held, which a large erasure holds for longer than the append's patience."""
    session = await chat.create_session()
    eraser = await asyncpg.connect(database_url)
    async with eraser.transaction():
        await eraser.execute(
            "DELETE FROM chat_sessions WHERE user_id = $1 AND id = $2", chat.user_id, session.id
        )
        waiting = [
            asyncio.create_task(failures.failure_of(chat.append(session.id, f"{n}")))
            for n in range(3)
        ]
        await asyncio.sleep(2)  # Each try waits for the lock for 75 ms.
    await eraser.close()
    assert {found.reason for found in await asyncio.gather(*waiting)} == {"SESSION_NOT_FOUND"}
