"""What a session holds, read from the tables themselves, and what must be true of every session at any time."""

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
    deleted: bool


class History(NamedTuple):
    """A stored session."""

    state: int
    last_seq: int
    message_count: int
    messages: list[StoredMessage]
    title: str = ""

    def check(self) -> None:
        """Assert what holds of every session: seq 1, 2, 3… without gap or tie, right counts, times that follow seq."""
        assert [message.seq for message in self.messages] == list(range(1, self.last_seq + 1))
        assert self.message_count == sum(not message.deleted for message in self.messages)
        assert len({message.id for message in self.messages}) == len(self.messages)
        times = [message.created_us for message in self.messages]
        assert times == sorted(times), "create_time goes backwards against seq"

    def check_contains(self, replies: Iterable[message_pb2.AppendMessagesResponse]) -> None:
        """Assert that every acknowledged message is there once, where and when its acknowledgement said."""
        self.check()
        places = {message.id: (message.seq, message.created_us) for message in self.messages}
        for reply in replies:
            for entry in reply.messages:
                assert places.get(entry.id) == (entry.seq, entry.create_time.ToMicroseconds()), (
                    entry
                )


_SESSION = (
    "SELECT state, last_seq, message_count, title FROM chat_sessions WHERE user_id = $1 AND id = $2"
)
_MESSAGES = """
SELECT seq, id::text, content, (extract(epoch FROM created_at) * 1000000)::bigint AS created_us, fingerprint,
       deleted_at IS NOT NULL AS deleted
FROM chat_messages WHERE user_id = $1 AND session_id = $2 ORDER BY seq
"""


async def read_history(database_url: str, user_id: str, session_id: str) -> History | None:
    """Read a session as it is at one moment, or None."""
    async with (
        connected_to(database_url) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        sessions = await connection.fetch(_SESSION, user_id, session_id)
        messages = [
            StoredMessage(*row) for row in await connection.fetch(_MESSAGES, user_id, session_id)
        ]
    if not sessions:
        assert not messages, "messages without their session"
        return None
    state, last_seq, message_count, title = sessions[0]
    return History(state, last_seq, message_count, messages, title)


async def read_valid_history(database_url: str, user_id: str, session_id: str) -> History:
    """Read a session that must be there and be sound."""
    found = await read_history(database_url, user_id, session_id)
    assert found is not None
    found.check()
    return found
