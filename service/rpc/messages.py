"""The RPCs of messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from functools import partial

from chathistory.v1 import message_pb2

from service.errors import FieldViolation, InvalidArgument, NotFound, OutOfRange, Unauthenticated
from service.ids import new_id
from service.rpc import convert, field_masks, paging
from service.rpc.admission import draining_error
from service.rpc.call import Call
from service.rpc.conversion_turns import PAUSE_PARTS, PAUSE_REQUEST_BYTES
from service.rpc.convert_structs import StructReader
from service.rpc.handler import Handler, require_same_id
from service.rpc.page_tokens import parse_integer
from service.store import context, message_pages, messages, sessions, watch_pages
from service.store.append.request import Append, NewMessage, NewSession
from service.store.bounded_reads import STREAM_PAGE_BYTES, read_held
from service.store.rows import MessageRow
from service.store.watch import Watcher
from service.store.watch_pages import WatchPosition

DEFAULT_MAX_MESSAGES = 50
WATCH_PAGE_SIZE = 100
"""Messages that one read of a watch returns, at most."""
AFTER_CREATE_TIME = "chathistory-after-create-time"
"""Metadata of WatchMessages: microseconds since 1970 of the creation of the message at `after_seq`.

With it a watch that is opened again notices that another message has taken this seq.
"""
_WRITABLE = ("content", "parts", "metadata", "token_count", "feedback")


class Messages(Handler):
    """Appends, reads, updates, deletes and watches messages."""

    async def AppendMessages(
        self, request: message_pb2.AppendMessagesRequest, call: Call
    ) -> message_pb2.AppendMessagesResponse:
        """Append messages atomically with consecutive seqs; those stored before keep theirs."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        starts_session = not session_id
        # Before the conversion, which also gives an id to a message of a client that sent none.
        has_derived_id = starts_session and bool(request.messages[0].id)
        new_messages = await self._new_messages(request, user_id, call.deadline)
        if starts_session:
            session_id = _derived_session_id(user_id, request)
        if request.HasField("session"):
            require_same_id("session.user_id", request.session.user_id, user_id)
            require_same_id("session.id", request.session.id, session_id)
        may_create = starts_session or request.create_if_missing
        append = Append(
            user_id,
            session_id,
            new_messages,
            call.deadline,
            may_create=may_create,
            has_derived_id=has_derived_id,
            expected_last_seq=(
                request.expected_last_seq if request.HasField("expected_last_seq") else None
            ),
            new_session=(
                convert.new_session(request.session, session_id) if may_create else NewSession()
            ),
            loop=self.appender.loop,
        )
        appended = await self.appender.append(append)
        reply = message_pb2.AppendMessagesResponse(
            session_id=session_id, session_created=appended.session_created
        )
        for entry in appended.entries:
            reply.messages.add(
                id=entry.id,
                seq=entry.seq,
                create_time=convert.timestamp(entry.created_us),
                replayed=entry.replayed,
            )
        return reply

    async def _new_messages(
        self, request: message_pb2.AppendMessagesRequest, owner_id: str, deadline: float
    ) -> list[NewMessage]:
        """Convert the messages of an append, and give each an id.

        Raises:
            InvalidArgument: a message breaks a rule that the protos cannot express, or two have one
                id.
        """
        ids: set[str] = set()
        new_messages: list[NewMessage] = []
        session_id = request.session_id.lower()
        reader = StructReader()
        part_count = step_bytes = 0
        for index, message in enumerate(request.messages):
            field = f"messages[{index}]"
            if message.session_id:
                require_same_id(f"{field}.session_id", message.session_id, session_id)
            # The server creates a missing id here, so that its own retries recognize the message.
            message_id = message.id.lower() or new_id()
            if message_id in ids:
                raise InvalidArgument.field(f"{field}.id", "is used twice in this request")
            ids.add(message_id)
            part_count += len(message.parts)
            if message.parts or message.HasField("metadata"):
                step_bytes += message.ByteSize()
            if part_count > PAUSE_PARTS or step_bytes > PAUSE_REQUEST_BYTES:
                await self.conversions.pause(owner_id, deadline)
                part_count = step_bytes = 0
            new_messages.append(convert.new_message(message, message_id, field, reader))
        return new_messages

    async def GetMessage(
        self, request: message_pb2.GetMessageRequest, call: Call
    ) -> message_pb2.GetMessageResponse:
        """Read one message."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        row = await self.database.read(
            lambda connection: messages.get(
                connection, user_id, session_id, request.message_id.lower()
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return message_pb2.GetMessageResponse(
            message=await self.conversions.message(row, session_id, user_id, call.deadline)
        )

    async def ListMessages(
        self, request: message_pb2.ListMessagesRequest, call: Call
    ) -> message_pb2.ListMessagesResponse:
        """List a session's messages by seq."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        descending = request.order == message_pb2.MESSAGE_ORDER_DESC
        tokens = await self.page_tokens.of_list(
            user_id, call.deadline, "ListMessages", user_id, session_id, descending
        )
        page_size = paging.effective_page_size(request.page_size)
        cursor = tokens.read(request.page_token, parse_integer)
        seq = cursor if cursor is not None else message_pages.MAX_SEQ if descending else 0
        page = None
        if self.lagging is not None and cursor is not None:
            page = await self.read_replica(
                lambda reads: message_pages.list_older_page(
                    reads,
                    user_id,
                    session_id,
                    seq,
                    page_size,
                    call,
                    descending=descending,
                    deadline=call.deadline,
                ),
                user_id,
                call,
            )
        rows, has_more = page or await message_pages.list_page(
            self.reads,
            user_id,
            session_id,
            seq,
            page_size,
            call,
            descending=descending,
            deadline=call.deadline,
        )
        reply = message_pb2.ListMessagesResponse()
        await self.conversions.add_messages(
            rows, session_id, reply.messages, user_id, call.deadline
        )
        if has_more:
            reply.next_page_token = tokens.make(str(rows[-1].seq))
        return reply

    async def UpdateMessage(
        self, request: message_pb2.UpdateMessageRequest, call: Call
    ) -> message_pb2.UpdateMessageResponse:
        """Update fields of a message."""
        user_id = call.caller.resolve_user_id(request.user_id)
        message = request.message
        session_id = (request.session_id or message.session_id).lower()
        require_same_id("message.session_id", message.session_id, session_id)
        required = {"session_id": session_id, "message.id": message.id}
        missing = [field for field, value in required.items() if not value]
        if missing:
            raise InvalidArgument.fields(
                tuple(FieldViolation(field, "is required") for field in missing)
            )
        paths = field_masks.update_paths(request.update_mask, message, _WRITABLE)
        if message.ByteSize() > PAUSE_REQUEST_BYTES:
            await self.conversions.pause(user_id, call.deadline)
        values = convert.message_changes(message, paths)

        async def measure(updated: MessageRow) -> int:
            resource = await self.conversions.message(updated, "", user_id, call.deadline)
            changes_size = not values.keys().isdisjoint(("content", "parts", "metadata"))
            return convert.stored_size(
                resource, updated.parts, updated.metadata, is_checked=changes_size
            )

        row = await self.database.write(
            lambda connection: messages.update(
                connection,
                user_id,
                session_id,
                message.id.lower(),
                values,
                message.etag,
                measure,
                search_enabled=self.search.indexes_messages,
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        self.search.wake()
        return message_pb2.UpdateMessageResponse(
            message=await self.conversions.message(row, session_id, user_id, call.deadline)
        )

    async def DeleteMessage(
        self, request: message_pb2.DeleteMessageRequest, call: Call
    ) -> message_pb2.DeleteMessageResponse:
        """Delete a message's content; a tombstone keeps its id and seq."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        message_id = request.message_id.lower()
        try:
            was_deleted = await self.database.write(
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
            was_deleted = False
        if not was_deleted:
            if not request.allow_missing:
                raise NotFound.message_in(session_id, message_id)
            await self.confirm_absence(user_id, call)
        return message_pb2.DeleteMessageResponse()

    async def GetContext(
        self, request: message_pb2.GetContextRequest, call: Call
    ) -> message_pb2.GetContextResponse:
        """Choose the messages for the next prompt."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        limits = context.Limits(request.max_messages or DEFAULT_MAX_MESSAGES, request.max_tokens)
        prompt = None
        if self.lagging is not None:
            prompt = await self.read_replica(
                lambda reads: context.get(reads, user_id, session_id, limits, call, call.deadline),
                user_id,
                call,
            )
        prompt = prompt or await context.get(
            self.reads, user_id, session_id, limits, call, call.deadline
        )
        reply = message_pb2.GetContextResponse(
            session=convert.session(prompt.session),
            omitted_count=prompt.omitted_count,
            token_count=prompt.token_count,
        )
        await self.conversions.add_messages(
            prompt.messages, session_id, reply.messages, user_id, call.deadline
        )
        return reply

    async def WatchMessages(
        self, request: message_pb2.WatchMessagesRequest, call: Call
    ) -> AsyncGenerator[message_pb2.WatchMessagesResponse]:
        """Send the messages after a seq, then each new one: in order, no gap, no repetition."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        seen_created_us = _seen_created_us(call)
        position = await self.database.read(
            lambda connection: watch_pages.open_position(
                connection, user_id, session_id, request.after_seq, seen_created_us
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        loop = asyncio.get_running_loop()
        with Watcher(
            self.watchers, (user_id, session_id), position.session_created_us, position.seq
        ) as watcher:
            while True:
                watcher.arm()
                remaining_s = self._remaining_s(watcher, call)
                if watcher.history_restored:
                    raise await self._restored_error(position)
                rows, has_more = await self._next_watch_page(position, call)
                for row in rows:
                    message = await self.conversions.message(
                        row, session_id, user_id, loop.time() + self.call_timeout_s
                    )
                    yield message_pb2.WatchMessagesResponse(message=message)
                    position = position._replace(seq=row.seq, seen_created_us=row.created_us)
                call.release(message_pages.total_bytes(rows))
                del rows  # The watch may wait for long.
                if not has_more:
                    await watcher.wait(remaining_s)

    async def _restored_error(self, position: WatchPosition) -> OutOfRange:
        """Return the error that ends a watch because the database has gone back in time.

        Raises:
            NotFound: the session did not exist at that time.
        """
        session = await self.database.read(
            lambda connection: sessions.get(connection, position.user_id, position.session_id),
            owner_id=position.user_id,
            deadline=asyncio.get_running_loop().time() + self.call_timeout_s,
        )
        return OutOfRange.history_restored(position.session_id, session.last_seq)

    async def _next_watch_page(
        self, position: WatchPosition, call: Call
    ) -> tuple[list[MessageRow], bool]:
        """Read the next messages of a watch, and hold their bytes.

        Slow clients wait for room before their messages are read, so that these stay in the
        database.
        """
        await call.reserve(STREAM_PAGE_BYTES)
        rows, unread = await watch_pages.list_since(
            self.reads,
            position,
            WATCH_PAGE_SIZE,
            deadline=asyncio.get_running_loop().time() + self.call_timeout_s,
        )
        call.release(STREAM_PAGE_BYTES - message_pages.total_bytes(rows))
        if rows or unread is None:
            return rows, unread is not None or len(rows) == WATCH_PAGE_SIZE
        # A message that is larger than a page, or a long run of tombstones.
        page = await read_held(
            call,
            partial(watch_pages.list_large_since, self.database, position, WATCH_PAGE_SIZE),
            self.call_timeout_s,
        )
        return page.rows, page.unread_bytes is not None or len(page.rows) == WATCH_PAGE_SIZE

    def _remaining_s(self, watcher: Watcher, call: Call) -> float | None:
        """Return the seconds until the caller's token expires; None if it never does.

        Raises:
            NotFound: the session was deleted.
            Unauthenticated: the token has expired.
            Unavailable: the server is shutting down (DRAINING).
        """
        if self.watchers.is_closing:
            raise draining_error()
        if watcher.session_deleted:
            raise NotFound.session(watcher.key[1])
        expires_at = call.caller.expires_at
        if expires_at is None:
            return None
        remaining_s = expires_at - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            raise Unauthenticated("the token has expired; open the stream again with a new one")
        return remaining_s


def _seen_created_us(call: Call) -> int:
    """Return when the message at `after_seq` was created, as the client knows; 0 if it does not.

    Raises:
        InvalidArgument: the metadata is not a number.
    """
    text = call.metadata(AFTER_CREATE_TIME)
    try:
        return parse_integer(text) if text else 0
    except ValueError:
        raise InvalidArgument.field(
            AFTER_CREATE_TIME, "must be a number of microseconds since 1970"
        ) from None


def _derived_session_id(user_id: str, request: message_pb2.AppendMessagesRequest) -> str:
    """Return the id of a new session, derived from its first message's so that a retry finds it."""
    first_message_id = request.messages[0].id
    if not first_message_id:
        return new_id()
    return str(uuid.uuid5(uuid.UUID(user_id), first_message_id))
