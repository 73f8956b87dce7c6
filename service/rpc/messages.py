"""The RPCs of messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator

from chathistory.v1 import message_pb2, session_pb2

from service.errors import FieldViolation, InvalidArgument, NotFound, Unauthenticated
from service.ids import new_id
from service.rpc import convert, field_masks, paging
from service.rpc.admission import draining
from service.rpc.call import Call
from service.rpc.handler import Handler, require_same_id
from service.store import context, messages, sessions
from service.store.append.request import Append, NewMessage, NewSession
from service.store.watch import Watcher

DEFAULT_MAX_MESSAGES = 50
WATCH_PAGE = 100
"""Messages that a watch reads at a time."""
_WRITABLE = ("content", "parts", "metadata", "token_count", "feedback")


class Messages(Handler):
    """Appends, reads, changes, erases and follows messages."""

    async def AppendMessages(
        self, request: message_pb2.AppendMessagesRequest, call: Call
    ) -> message_pb2.AppendMessagesResponse:
        """Append messages: all of them, next to each other, or none; those that are stored already keep their places."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        new = _new_messages(request)
        opens = not session_id
        if opens:
            session_id = _derived_id(user_id, request)
        may_create = opens or request.create_if_missing
        item = Append(
            user_id,
            session_id,
            new,
            call.deadline,
            may_create=may_create,
            expected_last_seq=request.expected_last_seq
            if request.HasField("expected_last_seq")
            else None,
            new_session=_new_session(request, user_id, session_id) if may_create else NewSession(),
            loop=self.appender.loop,
        )
        stored = await self.appender.append(item)
        reply = message_pb2.AppendMessagesResponse(
            session_id=session_id, session_created=stored.session_created
        )
        for entry in stored.entries:
            reply.messages.add(
                id=entry.id,
                seq=entry.seq,
                create_time=convert.time(entry.created_us),
                replayed=entry.replayed,
            )
        return reply

    async def GetMessage(
        self, request: message_pb2.GetMessageRequest, call: Call
    ) -> message_pb2.GetMessageResponse:
        """Read one message."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        row = await self.database.read(
            lambda connection: messages.get(
                connection, user_id, session_id, request.message_id.lower()
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return message_pb2.GetMessageResponse(message=convert.message(row, session_id))

    async def ListMessages(
        self, request: message_pb2.ListMessagesRequest, call: Call
    ) -> message_pb2.ListMessagesResponse:
        """List a session's messages by seq."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        descending = request.order == message_pb2.MESSAGE_ORDER_DESC
        bound = ("ListMessages", user_id, session_id, descending)
        size = paging.page_size(request.page_size)
        place = paging.place(request.page_token, *bound)
        start = int(place) if place is not None else messages.MAX_SEQ if descending else 0
        rows, more = await messages.list_page(
            self.reads,
            user_id,
            session_id,
            start,
            size,
            descending=descending,
            deadline=call.deadline,
        )
        reply = message_pb2.ListMessagesResponse()
        for row in paging.fitting(rows):
            convert.message(row, session_id, reply.messages.add)
        if more or len(reply.messages) < len(rows):
            reply.next_page_token = paging.token(str(reply.messages[-1].seq), *bound)
        return reply

    async def UpdateMessage(
        self, request: message_pb2.UpdateMessageRequest, call: Call
    ) -> message_pb2.UpdateMessageResponse:
        """Change fields of a message."""
        user_id = call.caller.resolve_user_id(request.user_id)
        sent = request.message
        session_id = (request.session_id or sent.session_id).lower()
        require_same_id("message.session_id", sent.session_id, session_id)
        missing = [
            name
            for name, value in (("session_id", session_id), ("message.id", sent.id))
            if not value
        ]
        if missing:
            raise InvalidArgument.fields(
                tuple(FieldViolation(name, "is required") for name in missing)
            )
        values = convert.message_changes(
            sent, field_masks.paths(request.update_mask, sent, _WRITABLE)
        )
        row = await self.database.write(
            lambda connection: messages.update(
                connection,
                user_id,
                session_id,
                sent.id.lower(),
                values,
                sent.etag,
                convert.message_size,
                search_enabled=self.search.indexes_messages,
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        self.search.wake()
        return message_pb2.UpdateMessageResponse(message=convert.message(row, session_id))

    async def DeleteMessage(
        self, request: message_pb2.DeleteMessageRequest, call: Call
    ) -> message_pb2.DeleteMessageResponse:
        """Erase what a message says; its id and seq stay taken."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        message_id = request.message_id.lower()
        try:
            gone = await self.database.write(
                lambda connection: messages.delete(
                    connection,
                    user_id,
                    session_id,
                    message_id,
                    search_enabled=self.search.indexes_messages,
                ),
                owner_id=user_id,
                deadline=call.deadline,
            )
            self.search.wake()
        except NotFound:
            if not request.allow_missing:
                raise
            gone = True
        if not gone and not request.allow_missing:
            raise NotFound.message_in(session_id, message_id)
        return message_pb2.DeleteMessageResponse()

    async def GetContext(
        self, request: message_pb2.GetContextRequest, call: Call
    ) -> message_pb2.GetContextResponse:
        """Read what goes into the next prompt."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        limits = context.Limits(request.max_messages or DEFAULT_MAX_MESSAGES, request.max_tokens)
        chosen = await context.get(self.reads, user_id, session_id, limits, call.deadline)
        reply = message_pb2.GetContextResponse(
            session=convert.session(chosen.session),
            omitted_count=chosen.omitted_count,
            token_count=chosen.token_count,
        )
        for row in chosen.messages:
            convert.message(row, session_id, reply.messages.add)
        return reply

    async def WatchMessages(
        self, request: message_pb2.WatchMessagesRequest, call: Call
    ) -> AsyncGenerator[message_pb2.WatchMessagesResponse]:
        """Send a session's messages after a seq, then each new one: no gap, no duplicate, in order."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        session = await self.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=call.deadline,
        )
        loop = asyncio.get_running_loop()
        seq = request.after_seq
        with Watcher(self.watchers, (user_id, session_id), session.created_us, seq) as watcher:
            while True:
                watcher.arm()
                left = self._time_left(watcher, call)
                deadline = loop.time() + self.call_timeout
                rows, more = await messages.list_since(
                    self.reads,
                    user_id,
                    session_id,
                    watcher.session_created_us,
                    seq,
                    WATCH_PAGE,
                    deadline=deadline,
                )
                for row in rows:
                    yield message_pb2.WatchMessagesResponse(
                        message=convert.message(row, session_id)
                    )
                    seq = row.seq
                if not more:
                    await watcher.wait(left)

    def _time_left(self, watcher: Watcher, call: Call) -> float | None:
        """Return for how many seconds the session may be followed on; None for ever.

        Raises:
            NotFound: the session has been erased.
            Unauthenticated: what the caller has shown of itself has expired.
            Unavailable: the server is going away (DRAINING).
        """
        if self.watchers.is_closing:
            raise draining()
        if watcher.session_deleted:
            raise NotFound.session(watcher.key[1])
        expires_at = call.caller.expires_at
        left = None if expires_at is None else expires_at - asyncio.get_running_loop().time()
        if left is not None and left <= 0:
            raise Unauthenticated("the token has expired")
        return left


def _new_messages(request: message_pb2.AppendMessagesRequest) -> list[NewMessage]:
    """Read the messages of an append, each with an id.

    Raises:
        InvalidArgument: one of them breaks a rule that the protos cannot say, or an id comes twice.
    """
    ids: set[str] = set()
    new: list[NewMessage] = []
    session_id = request.session_id.lower()
    for n, sent in enumerate(request.messages):
        field = f"messages[{n}]"
        if sent.session_id:
            require_same_id(f"{field}.session_id", sent.session_id, session_id)
        # Made here when the client gave none: the server's own retries need one too.
        message_id = sent.id.lower() or new_id()
        if message_id in ids:
            raise InvalidArgument.field(f"{field}.id", "comes twice in this request")
        ids.add(message_id)
        new.append(convert.new_message(sent, message_id, field))
    return new


def _derived_id(user_id: str, request: message_pb2.AppendMessagesRequest) -> str:
    """Return the id of a session that an append starts: made from its first message's id, so that a retry finds it."""
    first = request.messages[0].id
    return str(uuid.uuid5(uuid.UUID(user_id), first)) if first else new_id()


def _new_session(
    request: message_pb2.AppendMessagesRequest, user_id: str, session_id: str
) -> NewSession:
    """Read what a session starts with.

    Raises:
        InvalidArgument: it contradicts the request, or breaks a rule that the protos cannot say.
    """
    sent = request.session
    require_same_id("session.user_id", sent.user_id, user_id)
    require_same_id("session.id", sent.id, session_id)
    if sent.state == session_pb2.SESSION_STATE_ARCHIVED:
        raise InvalidArgument.field("session.state", "an archived session takes no messages")
    values = convert.session_values(sent, session_id)
    metadata = convert.struct_json(sent.metadata, "session.metadata")
    return NewSession(values["title"], values["summary"], metadata, values["fingerprint"])
