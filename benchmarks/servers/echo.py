"""The upper bound: a `grpc.aio` servicer that only builds the same replies from memory."""

# ruff: noqa: N802, ARG002 - gRPC determines the names and arguments of the methods

from __future__ import annotations

import time
import uuid
from typing import Any

from chathistory.v1 import chat_history_service_pb2_grpc, message_pb2, session_pb2

from benchmarks.servers.lifecycle import run, serve
from benchmarks.workload import READ_CONTENT, READ_MESSAGES, SESSION_MESSAGES, estimated_tokens

# The rows of a page, as a store returns them.
_ROWS = [
    (str(uuid.uuid4()), seq, 1 + (seq + 1) % 2, READ_CONTENT) for seq in range(1, READ_MESSAGES + 1)
]
# The fastest plain way to set a Timestamp field.
_TIME: Any = {"seconds": int(time.time()), "nanos": 123_456_000}
_ETAG = "644f5ab6a2f40.1"
_TOKEN = "x" * 38


def _add_messages(
    reply: message_pb2.ListMessagesResponse | message_pb2.GetContextResponse, session_id: str
) -> None:
    for id_, seq, role, content in _ROWS:
        reply.messages.add(
            id=id_,
            session_id=session_id,
            seq=seq,
            role=role,
            content=content,
            create_time=_TIME,
            update_time=_TIME,
            etag=_ETAG,
        )


class Echo(chat_history_service_pb2_grpc.ChatHistoryServiceServicer):
    """Builds replies and stores nothing."""

    def __init__(self) -> None:
        self._seq = 0

    async def AppendMessages(
        self, request: message_pb2.AppendMessagesRequest, context: Any
    ) -> message_pb2.AppendMessagesResponse:
        """Return sequence numbers as if the messages were stored."""
        reply = message_pb2.AppendMessagesResponse(session_id=request.session_id)
        for message in request.messages:
            self._seq += 1
            reply.messages.add(id=message.id, seq=self._seq, create_time=_TIME)
        return reply

    async def ListMessages(
        self, request: message_pb2.ListMessagesRequest, context: Any
    ) -> message_pb2.ListMessagesResponse:
        """Return a page."""
        reply = message_pb2.ListMessagesResponse(next_page_token=_TOKEN)
        _add_messages(reply, request.session_id)
        return reply

    async def GetContext(
        self, request: message_pb2.GetContextRequest, context: Any
    ) -> message_pb2.GetContextResponse:
        """Return a session and a page."""
        reply = message_pb2.GetContextResponse(
            session=session_pb2.Session(
                id=request.session_id,
                user_id=request.user_id,
                state=session_pb2.SESSION_STATE_ACTIVE,
                last_seq=SESSION_MESSAGES,
                message_count=SESSION_MESSAGES,
                create_time=_TIME,
                update_time=_TIME,
                etag=_ETAG,
            ),
            omitted_count=SESSION_MESSAGES - READ_MESSAGES,
            token_count=READ_MESSAGES * estimated_tokens(READ_CONTENT),
        )
        _add_messages(reply, request.session_id)
        return reply


if __name__ == "__main__":
    run(serve(Echo()))  # type: ignore[abstract]  # the other methods are not called
