"""Weak locks of others on a session's row, as every foreign key check takes them, do not make the session look new."""

import asyncpg
import pytest

from tests.support.chat import Chat


@pytest.mark.parametrize("ended", [0, 1, 2])
async def test_an_append_finds_the_session_under_the_locks_of_others(chat: Chat, database_url: str, ended: int) -> None:
    session = await chat.create_session()
    connections = [await asyncpg.connect(database_url) for _ in range(2)]
    held = []
    for connection in connections:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "SELECT FROM chat_sessions WHERE user_id = $1 AND id = $2 FOR KEY SHARE", chat.user_id, session.id
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
