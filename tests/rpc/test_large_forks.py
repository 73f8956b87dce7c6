"""Forks of many messages: they use the permits of expensive work."""

from __future__ import annotations

from typing import Any

import pytest

from service.server import Server
from service.store import sessions
from service.store.db.work_class import WorkClass
from tests.support.chat import Chat, new_message, new_messages


@pytest.mark.parametrize(
    ("limit", "max_count", "max_bytes"), [("count", 5, 1_000_000), ("bytes", 1000, 5_000)]
)
async def test_fork_is_expensive_if_it_copies_much(
    server: Server,
    chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    max_count: int,
    max_bytes: int,
) -> None:
    monkeypatch.setattr(sessions, "MAX_SMALL_COPY", max_count)
    monkeypatch.setattr(sessions, "MAX_SMALL_COPY_BYTES", max_bytes)
    session = await chat.start([*new_messages(5), new_message("x" * 5000 * (limit == "bytes"))])
    classes: list[object] = []
    write = server.database.write

    async def recorded_write(work: Any, **arguments: Any) -> Any:
        classes.append(arguments["work_class"])
        return await write(work, **arguments)

    monkeypatch.setattr(server.database, "write", recorded_write)
    for through_seq in (5, 6):
        fork = await chat.fork(session, through_seq)
        assert fork.message_count == through_seq
    assert classes == [WorkClass.ORDINARY, WorkClass.EXPENSIVE]
