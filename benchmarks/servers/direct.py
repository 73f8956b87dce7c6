"""The lower bound of an append: a servicer that runs the same statement by asyncpg, one at a time.

It has no pipeline, no queue and no SQLAlchemy, and keeps one connection open.
"""

# ruff: noqa: N802, ARG002 - gRPC determines the names and arguments of the methods

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from chathistory.v1 import chat_history_service_pb2_grpc, message_pb2

from benchmarks.servers.lifecycle import database_url, run, serve
from benchmarks.workload import estimated_tokens, reply_size
from service.store.append.lane import LOCK_TIMEOUT
from service.store.append.request import Append, NewMessage
from service.store.append.sql import append_arguments, statements


class Direct(chat_history_service_pb2_grpc.ChatHistoryServiceServicer):
    """Appends messages and implements nothing else."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()

    async def AppendMessages(
        self, request: message_pb2.AppendMessagesRequest, context: Any
    ) -> message_pb2.AppendMessagesResponse:
        """Store the messages."""
        new_messages = [
            NewMessage(
                id=message.id,
                role=message.role,
                content=message.content,
                parts=None,
                metadata=None,
                token_count=None,
                token_estimate=estimated_tokens(message.content),
                size=reply_size(message.content),
                author="",
                feedback_score=None,
                feedback_comment=None,
                fingerprint=b"0123456789abcdef",
            )
            for message in request.messages
        ]
        append = Append(request.user_id, request.session_id, new_messages, 0.0)
        async with self._lock:
            statement = statements(enqueues=False).append
            [row] = await self._connection.fetch(
                statement.text, *append_arguments([append], LOCK_TIMEOUT)
            )
        create_time: Any = {
            "seconds": row["at"] // 1_000_000,
            "nanos": row["at"] % 1_000_000 * 1000,
        }
        reply = message_pb2.AppendMessagesResponse(session_id=request.session_id)
        first_seq = row["last_seq"] - len(new_messages) + 1
        for seq, message in enumerate(new_messages, first_seq):
            reply.messages.add(id=message.id, seq=seq, create_time=create_time)
        return reply


async def _main() -> None:
    connection = await asyncpg.connect(database_url())
    await serve(Direct(connection))  # type: ignore[abstract]  # the other methods are not called
    await connection.close()


if __name__ == "__main__":
    run(_main())
