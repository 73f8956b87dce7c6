"""Short forms of the calls and messages that most tests need."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from chathistory.v1 import message_pb2, session_pb2, user_pb2

from tests.support.servers import AsyncStub

USER, ASSISTANT, SYSTEM, TOOL = (
    message_pb2.ROLE_USER,
    message_pb2.ROLE_ASSISTANT,
    message_pb2.ROLE_SYSTEM,
    message_pb2.ROLE_TOOL,
)


def new_id() -> str:
    """Return a new id, as a client chooses it."""
    return str(uuid.uuid4())


def new_message(
    content: str, role: message_pb2.Role.ValueType = USER, **fields: Any
) -> message_pb2.Message:
    """Return a message with an id of its own."""
    defaults: dict[str, Any] = {"id": new_id(), "role": role, "content": content}
    return message_pb2.Message(**(defaults | fields))


def new_messages(count: int, prefix: str = "message") -> list[message_pb2.Message]:
    """Return `count` messages with numbered contents."""
    return [new_message(f"{prefix} {number}") for number in range(1, count + 1)]


class Chat:
    """The service as one user calls it: the requests carry the user's id.

    Methods whose names have no noun act on messages.
    """

    def __init__(self, stub: AsyncStub, user_id: str) -> None:
        self.stub = stub
        self.user_id = user_id

    @classmethod
    async def of_new_user(cls, stub: AsyncStub) -> Chat:
        """Create a user and return the service as that user calls it."""
        request = user_pb2.CreateUserRequest(user=user_pb2.User(name="a user"))
        return cls(stub, (await stub.CreateUser(request)).user.id)

    async def create_session(self, **fields: Any) -> session_pb2.Session:
        request = session_pb2.CreateSessionRequest(
            user_id=self.user_id, session=session_pb2.Session(**fields)
        )
        return (await self.stub.CreateSession(request)).session

    async def get_session(self, session_id: str) -> session_pb2.Session:
        request = session_pb2.GetSessionRequest(user_id=self.user_id, session_id=session_id)
        return (await self.stub.GetSession(request)).session

    async def update_session(self, mask: Sequence[str] = (), **fields: Any) -> session_pb2.Session:
        request = session_pb2.UpdateSessionRequest(
            user_id=self.user_id, session=session_pb2.Session(**fields)
        )
        request.update_mask.paths.extend(mask)
        return (await self.stub.UpdateSession(request)).session

    async def delete_session(self, session_id: str, **fields: Any) -> None:
        await self.stub.DeleteSession(
            session_pb2.DeleteSessionRequest(user_id=self.user_id, session_id=session_id, **fields)
        )

    async def fork(
        self, session_id: str, through_seq: int, new_session_id: str = ""
    ) -> session_pb2.Session:
        request = session_pb2.ForkSessionRequest(
            user_id=self.user_id,
            session_id=session_id,
            through_seq=through_seq,
            new_session_id=new_session_id,
        )
        return (await self.stub.ForkSession(request)).session

    async def list_sessions(self, **fields: Any) -> session_pb2.ListSessionsResponse:
        return await self.stub.ListSessions(
            session_pb2.ListSessionsRequest(user_id=self.user_id, **fields)
        )

    async def session_pages(self, **fields: Any) -> AsyncIterator[list[session_pb2.Session]]:
        """Iterate over the pages of sessions."""
        token, seen = "", set[str]()
        while True:
            assert token not in seen, "a page token was returned twice"
            seen.add(token)
            reply = await self.list_sessions(page_token=token, **fields)
            yield list(reply.sessions)
            token = reply.next_page_token
            if not token:
                return

    async def append(
        self, session_id: str, messages: Iterable[message_pb2.Message] | str, **fields: Any
    ) -> message_pb2.AppendMessagesResponse:
        """Append messages, or one message with this content."""
        if isinstance(messages, str):
            messages = [new_message(messages)]
        request = message_pb2.AppendMessagesRequest(
            user_id=self.user_id, session_id=session_id, messages=messages, **fields
        )
        return await self.stub.AppendMessages(request)

    async def start(
        self, messages: Iterable[message_pb2.Message] | str = "hello", **fields: Any
    ) -> str:
        """Create a session by an append without a session id, and return its id."""
        return (await self.append("", messages, **fields)).session_id

    async def get(self, session_id: str, message_id: str) -> message_pb2.Message:
        request = message_pb2.GetMessageRequest(
            user_id=self.user_id, session_id=session_id, message_id=message_id
        )
        return (await self.stub.GetMessage(request)).message

    async def page(self, session_id: str, **fields: Any) -> message_pb2.ListMessagesResponse:
        return await self.stub.ListMessages(
            message_pb2.ListMessagesRequest(user_id=self.user_id, session_id=session_id, **fields)
        )

    async def pages(
        self, session_id: str, **fields: Any
    ) -> AsyncIterator[list[message_pb2.Message]]:
        """Iterate over the pages of a session's messages."""
        token, seen = "", set[str]()
        while True:
            assert token not in seen, "a page token was returned twice"
            seen.add(token)
            reply = await self.page(session_id, page_token=token, **fields)
            yield list(reply.messages)
            token = reply.next_page_token
            if not token:
                return

    async def all(self, session_id: str, **fields: Any) -> list[message_pb2.Message]:
        """Return all messages of a session."""
        return [message async for page in self.pages(session_id, **fields) for message in page]

    async def update(
        self, session_id: str, message_id: str, mask: Sequence[str] = (), **fields: Any
    ) -> message_pb2.Message:
        request = message_pb2.UpdateMessageRequest(
            user_id=self.user_id,
            session_id=session_id,
            message=message_pb2.Message(id=message_id, **fields),
        )
        request.update_mask.paths.extend(mask)
        return (await self.stub.UpdateMessage(request)).message

    async def delete(self, session_id: str, message_id: str, **fields: Any) -> None:
        await self.stub.DeleteMessage(
            message_pb2.DeleteMessageRequest(
                user_id=self.user_id, session_id=session_id, message_id=message_id, **fields
            )
        )

    async def context(self, session_id: str, **fields: Any) -> message_pb2.GetContextResponse:
        return await self.stub.GetContext(
            message_pb2.GetContextRequest(user_id=self.user_id, session_id=session_id, **fields)
        )

    def watch(self, session_id: str, after_seq: int = 0, **options: Any) -> Any:
        """Follow a session; return the open call, which can be iterated over and cancelled."""
        request = message_pb2.WatchMessagesRequest(
            user_id=self.user_id, session_id=session_id, after_seq=after_seq
        )
        return self.stub.WatchMessages(request, **options)
