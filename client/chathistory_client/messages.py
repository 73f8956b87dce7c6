"""RPCs of messages: the content of sessions, in order."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Literal

from chathistory.v1 import message_pb2
from chathistory.v1.message_pb2 import (
    Feedback,
    Message,
    MessageHit,
    MessageOrder,
    Part,
    Role,
    SearchMode,
)
from chathistory.v1.session_pb2 import Session

from chathistory_client.connection import Connection, ReadConsistency, read_metadata
from chathistory_client.errors import ChatHistoryError
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager
from chathistory_client.resumption import ResumeBackoff, can_resume

AFTER_CREATE_TIME = "chathistory-after-create-time"
"""Metadata of WatchMessages: the creation time of the message at `after_seq`, in microseconds."""

ROLES: dict[str, Role.ValueType] = {
    "user": Role.ROLE_USER,
    "assistant": Role.ROLE_ASSISTANT,
    "system": Role.ROLE_SYSTEM,
    "tool": Role.ROLE_TOOL,
}


def message(
    role: Literal["user", "assistant", "system", "tool"],
    content: str = "",
    *,
    id: str = "",  # noqa: A002 - the field's name
    parts: Iterable[Part] = (),
    metadata: Metadata | None = None,
    token_count: int | None = None,
    author: str = "",
) -> Message:
    """Create a message with an id, ready to append.

    Appending the same message again is a replay and stores nothing.

    >>> hello = message("user", "Hello!")
    >>> hello.role == Role.ROLE_USER, hello.content, len(hello.id)
    (True, 'Hello!', 36)

    Args:
        role: Role of the author.
        content: Text for people, at most 256 KiB.
        id: UUID of the message. Empty for a new one.
        parts: Structured content, such as tool calls, at most 64 parts.
        metadata: JSON object of your own, at most 16 KiB.
        token_count: Tokens that the message takes in a prompt. None for the service's estimate.
        author: Display name of the author, at most 256 characters.
    """
    return Message(
        id=id or new_id(),
        role=ROLES[role],
        content=content,
        parts=parts,
        metadata=struct(metadata),
        token_count=token_count,
        author=author,
    )


class Messages(Connection):
    """Appends, reads, updates, deletes, searches and watches messages."""

    async def append_messages(
        self,
        *,
        messages: Sequence[Message],
        user_id: str = "",
        session_id: str = "",
        expected_last_seq: int | None = None,
        create_if_missing: bool = False,
        session: Session | None = None,
        timeout: float | None = None,
    ) -> message_pb2.AppendMessagesResponse:
        """Append messages to a session, all or none. Without `session_id`, create the session.

        Messages without an id get one before the first attempt, so retries store them once. The
        messages passed are not modified.

        >>> reply = await client.append_messages(
        ...     user_id=user_id,
        ...     messages=[message("user", "What is a heron?")],
        ...     session=Session(title="Herons"),
        ... )
        >>> reply.session_created, reply.messages[0].seq
        (True, 1)
        >>> answer = message("assistant", "A wading bird.")
        >>> for attempt in range(2):
        ...     reply = await client.append_messages(
        ...         user_id=user_id, session_id=reply.session_id, messages=[answer]
        ...     )
        ...     print(reply.messages[0].seq, reply.messages[0].replayed)
        2 False
        2 True

        Args:
            messages: 1 to 100 messages.
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session. Empty to create a session.
            expected_last_seq: If set, the session's `last_seq` must equal it. 0 expects an empty
                session.
            create_if_missing: True to create the session with `session_id` if it does not exist.
            session: Title, summary and metadata of a session that this call creates.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The session's id, and the `seq` of each message.

        Raises:
            NotFound: The session does not exist and `create_if_missing` is false
                (SESSION_NOT_FOUND), or its owner does not exist (USER_NOT_FOUND).
            AlreadyExists: A message with this id and other content is stored (MESSAGE_ID_REUSED).
            Conflict: `expected_last_seq` is not the session's `last_seq` (LAST_SEQ_MISMATCH).
            FailedPrecondition: The session is archived (SESSION_ARCHIVED).
        """
        request = message_pb2.AppendMessagesRequest(
            user_id=user_id,
            session_id=session_id,
            messages=messages,
            expected_last_seq=expected_last_seq,
            create_if_missing=create_if_missing,
            session=session,
        )
        for copy in request.messages:
            copy.id = copy.id or new_id()
        return await self._call(self._stub.AppendMessages, request, timeout)

    async def get_message(
        self, *, user_id: str = "", session_id: str, message_id: str, timeout: float | None = None
    ) -> Message:
        """Return one message.

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            message_id: Id of the message.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored message.

        Raises:
            NotFound: The session (SESSION_NOT_FOUND) or the message (MESSAGE_NOT_FOUND) does not
                exist.
        """
        request = message_pb2.GetMessageRequest(
            user_id=user_id, session_id=session_id, message_id=message_id
        )
        return (await self._call(self._stub.GetMessage, request, timeout)).message

    def list_messages(
        self,
        *,
        user_id: str = "",
        session_id: str,
        order: MessageOrder.ValueType = MessageOrder.MESSAGE_ORDER_ASC,
        page_size: int = 0,
        page_token: str = "",
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> Pager[message_pb2.ListMessagesResponse, Message]:
        """List the messages of a session, ordered by `seq`.

        >>> reply = await client.append_messages(
        ...     user_id=user_id, messages=[message("user", "Hi"), message("assistant", "Hello!")]
        ... )
        >>> pager = client.list_messages(user_id=user_id, session_id=reply.session_id)
        >>> [item.content async for item in pager]
        ['Hi', 'Hello!']

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            order: Ascending or descending.
            page_size: Maximum number of items in a page. 0 means 50, values over 1000 mean 1000.
            page_token: `next_page_token` of the page to continue after. Empty for the first page.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for each page, including retries. None for the client's default.

        Returns:
            A pager: `async for` iterates over all items, `await` returns one page.

        Raises:
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
        """
        metadata = read_metadata(read_consistency)

        async def fetch(token: str) -> message_pb2.ListMessagesResponse:
            request = message_pb2.ListMessagesRequest(
                user_id=user_id,
                session_id=session_id,
                order=order,
                page_size=page_size,
                page_token=token,
            )
            return await self._call(self._stub.ListMessages, request, timeout, metadata=metadata)

        return Pager(fetch, lambda page: page.messages, page_token)

    async def update_message(
        self,
        *,
        user_id: str = "",
        session_id: str,
        message_id: str,
        content: str | Unset = UNSET,
        parts: Sequence[Part] | Unset = UNSET,
        metadata: Metadata | Unset | None = UNSET,
        token_count: int | Unset | None = UNSET,
        feedback: Feedback | Unset | None = UNSET,
        etag: str = "",
        timeout: float | None = None,
    ) -> Message:
        """Update fields of a message.

        Fields that are left `UNSET` keep their value; None and empty values clear a field.

        >>> hello = message("user", "Helo")
        >>> reply = await client.append_messages(user_id=user_id, messages=[hello])
        >>> ids = {"user_id": user_id, "session_id": reply.session_id, "message_id": hello.id}
        >>> (await client.update_message(**ids, content="Hello")).content
        'Hello'
        >>> (await client.update_message(**ids, feedback=Feedback(score=1))).feedback.score
        1.0

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            message_id: Id of the message.
            content: Text for people, at most 256 KiB.
            parts: Structured content; replaces the stored parts.
            metadata: JSON object of your own; replaces the stored one.
            token_count: Tokens that the message takes in a prompt. None for the service's estimate.
            feedback: A reader's rating.
            etag: If set, the update succeeds only while this is the etag of the stored message.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored message after the update.

        Raises:
            ValueError: No field was passed.
            Conflict: `etag` is not that of the stored message (ETAG_MISMATCH).
            NotFound: The session (SESSION_NOT_FOUND) or the message (MESSAGE_NOT_FOUND) does not
                exist.
        """
        update = Message(id=message_id, etag=etag)
        mask = set_fields(
            update,
            content=content,
            parts=parts,
            metadata=metadata,
            token_count=token_count,
            feedback=feedback,
        )
        request = message_pb2.UpdateMessageRequest(
            user_id=user_id, session_id=session_id, message=update, update_mask=mask
        )
        return (await self._call(self._stub.UpdateMessage, request, timeout)).message

    async def delete_message(
        self,
        *,
        user_id: str = "",
        session_id: str,
        message_id: str,
        allow_missing: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Erase the content of a message. Its `seq` is not reused, and no message is renumbered.

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            message_id: Id of the message.
            allow_missing: True to succeed when the message or its session does not exist.
            timeout: Seconds for the call, including retries. None for the client's default.

        Raises:
            NotFound: The session (SESSION_NOT_FOUND) or the message (MESSAGE_NOT_FOUND) does not
                exist.
        """
        request = message_pb2.DeleteMessageRequest(
            user_id=user_id,
            session_id=session_id,
            message_id=message_id,
            allow_missing=allow_missing,
        )
        await self._call(self._stub.DeleteMessage, request, timeout)

    async def get_context(
        self,
        *,
        user_id: str = "",
        session_id: str,
        max_messages: int = 0,
        max_tokens: int = 0,
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> message_pb2.GetContextResponse:
        """Return the messages for the next prompt: the newest ones within the limits, oldest first.

        Leading SYSTEM messages and the newest group are returned even above the limits. Tool calls
        are returned together with their results.

        >>> first, second = message("user", "One"), message("user", "Two")
        >>> reply = await client.append_messages(
        ...     user_id=user_id, messages=[message("system", "Be brief."), first, second]
        ... )
        >>> context = await client.get_context(
        ...     user_id=user_id, session_id=reply.session_id, max_messages=2
        ... )
        >>> [item.content for item in context.messages], context.omitted_count
        (['Be brief.', 'Two'], 1)

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            max_messages: Maximum number of messages, up to 1000. 0 means 50.
            max_tokens: Maximum number of tokens. 0 means no limit.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The session, the messages, the number of omitted messages, and the tokens.

        Raises:
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
        """
        metadata = read_metadata(read_consistency)
        request = message_pb2.GetContextRequest(
            user_id=user_id, session_id=session_id, max_messages=max_messages, max_tokens=max_tokens
        )
        return await self._call(self._stub.GetContext, request, timeout, metadata=metadata)

    async def search_messages(
        self,
        *,
        query: str,
        user_id: str = "",
        session_id: str = "",
        limit: int = 0,
        mode: SearchMode.ValueType = SearchMode.SEARCH_MODE_UNSPECIFIED,
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> Sequence[MessageHit]:
        """Search one user's messages by words, by meaning, or by both.

        >>> _ = await client.append_messages(
        ...     user_id=user_id,
        ...     messages=[message("user", "Do herons wade?"), message("assistant", "They do.")],
        ... )
        >>> hits = await client.search_messages(
        ...     user_id=user_id, query="herons", mode=SearchMode.SEARCH_MODE_LEXICAL
        ... )
        >>> [hit.message.content for hit in hits], "<mark>herons</mark>" in hits[0].snippet
        (['Do herons wade?'], True)

        Args:
            query: Text to search for, at most 8 KiB.
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Only messages of this session. Empty for all sessions.
            limit: Maximum number of hits, up to 100. 0 means 10.
            mode: How to compare the query with messages. Unspecified for HYBRID where the service
                indexes messages, else LEXICAL.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The hits, best first. `snippet` is HTML-escaped and safe to insert into a web page.

        Raises:
            FailedPrecondition: The mode needs the search index of messages, which is disabled
                (SEARCH_DISABLED).
            Unavailable: The search index does not answer (SEARCH_UNAVAILABLE).
        """
        metadata = read_metadata(read_consistency)
        request = message_pb2.SearchMessagesRequest(
            user_id=user_id, query=query, session_id=session_id, limit=limit, mode=mode
        )
        return (
            await self._call(self._stub.SearchMessages, request, timeout, metadata=metadata)
        ).hits

    async def watch_messages(
        self, *, user_id: str = "", session_id: str, after_seq: int = 0
    ) -> AsyncGenerator[Message]:
        """Stream the messages after `after_seq`, then each new message.

        Messages arrive in the order of `seq`, without gaps or duplicates. The stream has no
        deadline. It resumes after a lost connection, a restart of the service and an expired token.

        >>> reply = await client.append_messages(user_id=user_id, messages=[message("user", "Hi")])
        >>> async for item in client.watch_messages(user_id=user_id, session_id=reply.session_id):
        ...     print(item.seq, item.content)
        ...     break
        1 Hi

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            after_seq: Last `seq` that is known already. 0 streams the whole session first.

        Raises:
            NotFound: The session does not exist, or it was deleted during the stream
                (SESSION_NOT_FOUND).
            OutOfRange: The database was restored to an earlier state (HISTORY_RESTORED). List the
                messages again, and watch from the last one.
        """
        request = message_pb2.WatchMessagesRequest(
            user_id=user_id, session_id=session_id, after_seq=after_seq
        )
        backoff = ResumeBackoff()
        metadata: dict[str, str] = {}
        while True:
            token = await self._get_token(self._timeout_s)
            try:
                async with aclosing(
                    self._stream(lambda stub: stub.WatchMessages, request, token, metadata=metadata)
                ) as responses:
                    async for response in responses:
                        backoff.reset()
                        if response.message.seq > request.after_seq:
                            request.after_seq = response.message.seq
                            # With it the service notices that the message was lost by a restore.
                            created_us = response.message.create_time.ToMicroseconds()
                            metadata[AFTER_CREATE_TIME] = str(created_us)
                            yield response.message
            except ChatHistoryError as error:
                if self._pool.is_closed:
                    raise
                if not can_resume(error) and not (
                    # At most one refresh until the next message, so that rejections cannot loop.
                    backoff.is_reset
                    and await self._refresh_token(error, token, self._timeout_s) is not None
                ):
                    raise
                await backoff.pause(error.retry_after)
            else:
                await backoff.pause()
