"""Stored sessions, read from the tables, and the checks that every session passes at any time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from chathistory.v1 import message_pb2

from tests.support.cluster import connected_to


class StoredMessage(NamedTuple):
    """A stored message, or its tombstone."""

    seq: int
    id: str
    content: str
    created_us: int
    fingerprint: bytes
    is_deleted: bool


class History(NamedTuple):
    """A stored session."""

    state: int
    last_seq: int
    message_count: int
    messages: list[StoredMessage]
    title: str = ""

    def check(self) -> None:
        """Check that seqs have no gap and no duplicate, and that counts and times fit them."""
        assert [message.seq for message in self.messages] == list(range(1, self.last_seq + 1))
        assert self.message_count == sum(not message.is_deleted for message in self.messages)
        assert len({message.id for message in self.messages}) == len(self.messages)
        times = [message.created_us for message in self.messages]
        assert times == sorted(times), "create_time decreases while seq increases"

    def check_contains(self, replies: Iterable[message_pb2.AppendMessagesResponse]) -> None:
        """Check that each acknowledged message is stored once, with that seq and time."""
        self.check()
        stored = {message.id: (message.seq, message.created_us) for message in self.messages}
        for reply in replies:
            for entry in reply.messages:
                assert stored.get(entry.id) == (entry.seq, entry.create_time.ToMicroseconds()), (
                    entry
                )


_SESSION = (
    "SELECT state, last_seq, message_count, title FROM chat_sessions WHERE user_id = $1 AND id = $2"
)
_MESSAGES = """
SELECT seq, id::text, content, (extract(epoch FROM created_at) * 1000000)::bigint AS created_us,
       fingerprint, deleted_at IS NOT NULL AS is_deleted
FROM chat_messages WHERE user_id = $1 AND session_id = $2 ORDER BY seq
"""


async def read_history(database_url: str, user_id: str, session_id: str) -> History | None:
    """Read a session in one snapshot; None if there is none."""
    async with (
        connected_to(database_url) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        sessions = await connection.fetch(_SESSION, user_id, session_id)
        messages = [
            StoredMessage(*row) for row in await connection.fetch(_MESSAGES, user_id, session_id)
        ]
    if not sessions:
        assert not messages, "messages without a session"
        return None
    state, last_seq, message_count, title = sessions[0]
    return History(state, last_seq, message_count, messages, title)


async def read_valid_history(database_url: str, user_id: str, session_id: str) -> History:
    """Read a session that must exist, and check it."""
    history = await read_history(database_url, user_id, session_id)
    assert history is not None
    history.check()
    return history
