"""Messages: what was said, in order."""

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

from chathistory_client import resumption
from chathistory_client.connection import Connection
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager

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
    """Make a message, with an id: to append it a second time is a replay and changes nothing.

    >>> hello = message("user", "Hello!")
    >>> hello.role == Role.ROLE_USER, hello.content, len(hello.id)
    (True, 'Hello!', 36)
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
    """Appends, reads, changes, erases and follows messages. A user caller may leave `user_id` out."""

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
        """Append messages, 1 to 100 of them, all or none; without `session_id` they start a session.

        Messages that have no id get one, once, before the first attempt: whatever is tried again is stored once.

        >>> reply = await client.append_messages(
        ...     user_id=user_id,
        ...     messages=[message("user", "What is a heron?")],
        ...     session=Session(title="Herons"),
        ... )
        >>> reply.session_created, reply.messages[0].seq
        (True, 1)
        >>> answer = message("assistant", "A wading bird.")
        >>> for attempt in range(2):
        ...     reply = await client.append_messages(user_id=user_id, session_id=reply.session_id, messages=[answer])
        ...     print(reply.messages[0].seq, reply.messages[0].replayed)
        2 False
        2 True

        Raises:
            NotFound: there is no such session and `create_if_missing` is not said (SESSION_NOT_FOUND), or no such user.
            AlreadyExists: a message's id stands for another content (MESSAGE_ID_REUSED).
            Conflict: `expected_last_seq` is given, and others have appended (LAST_SEQ_MISMATCH).
            FailedPrecondition: the session is archived (SESSION_ARCHIVED).
        """
        request = message_pb2.AppendMessagesRequest(
            user_id=user_id,
            session_id=session_id,
            messages=messages,
            expected_last_seq=expected_last_seq,
            create_if_missing=create_if_missing,
            session=session,
        )
        for sent in request.messages:  # Copies: the caller's own stay as they are.
            sent.id = sent.id or new_id()
        return await self._call(self._stub.AppendMessages, request, timeout)

    async def get_message(
        self, *, user_id: str = "", session_id: str, message_id: str, timeout: float | None = None
    ) -> Message:
        """Read one message."""
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
        timeout: float | None = None,
    ) -> Pager[message_pb2.ListMessagesResponse, Message]:
        """List a session's messages by `seq`: `async for` gives all of them, `await` one page.

        >>> said = [message("user", "Hi"), message("assistant", "Hello!")]
        >>> reply = await client.append_messages(user_id=user_id, messages=said)
        >>> [each.content async for each in client.list_messages(user_id=user_id, session_id=reply.session_id)]
        ['Hi', 'Hello!']
        """

        async def fetch(token: str) -> message_pb2.ListMessagesResponse:
            request = message_pb2.ListMessagesRequest(
                user_id=user_id,
                session_id=session_id,
                order=order,
                page_size=page_size,
                page_token=token,
            )
            return await self._call(self._stub.ListMessages, request, timeout)

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
        """Change the fields that are given.

        >>> hello = message("user", "Helo")
        >>> reply = await client.append_messages(user_id=user_id, messages=[hello])
        >>> place = {"user_id": user_id, "session_id": reply.session_id, "message_id": hello.id}
        >>> (await client.update_message(**place, content="Hello")).content
        'Hello'
        >>> (await client.update_message(**place, feedback=Feedback(score=1))).feedback.score
        1.0

        Raises:
            Conflict: `etag` is given and is not that of the stored message (ETAG_MISMATCH).
        """
        changed = Message(id=message_id, etag=etag)
        mask = set_fields(
            changed,
            content=content,
            parts=parts,
            metadata=metadata,
            token_count=token_count,
            feedback=feedback,
        )
        request = message_pb2.UpdateMessageRequest(
            user_id=user_id, session_id=session_id, message=changed, update_mask=mask
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
        """Erase what a message says; its `seq` stays taken, and nothing is renumbered."""
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
        timeout: float | None = None,
    ) -> message_pb2.GetContextResponse:
        """Read what goes into the next prompt: the newest messages within the limits, oldest first.

        >>> said = [message("system", "Be brief."), message("user", "One"), message("user", "Two")]
        >>> reply = await client.append_messages(user_id=user_id, messages=said)
        >>> context = await client.get_context(user_id=user_id, session_id=reply.session_id, max_messages=2)
        >>> [each.content for each in context.messages], context.omitted_count
        (['Be brief.', 'Two'], 1)
        """
        request = message_pb2.GetContextRequest(
            user_id=user_id, session_id=session_id, max_messages=max_messages, max_tokens=max_tokens
        )
        return await self._call(self._stub.GetContext, request, timeout)

    async def search_messages(
        self,
        *,
        query: str,
        user_id: str = "",
        session_id: str = "",
        limit: int = 0,
        mode: SearchMode.ValueType = SearchMode.SEARCH_MODE_UNSPECIFIED,
        timeout: float | None = None,
    ) -> Sequence[MessageHit]:
        """Search one user's messages, best first; `snippet` is safe to put into a web page.

        >>> said = [message("user", "Do herons wade?"), message("assistant", "They do.")]
        >>> _ = await client.append_messages(user_id=user_id, messages=said)
        >>> hits = await client.search_messages(user_id=user_id, query="herons", mode=SearchMode.SEARCH_MODE_LEXICAL)
        >>> [hit.message.content for hit in hits], "<mark>herons</mark>" in hits[0].snippet
        (['Do herons wade?'], True)
        """
        request = message_pb2.SearchMessagesRequest(
            user_id=user_id, query=query, session_id=session_id, limit=limit, mode=mode
        )
        return (await self._call(self._stub.SearchMessages, request, timeout)).hits

    async def watch_messages(
        self, *, user_id: str = "", session_id: str, after_seq: int = 0
    ) -> AsyncGenerator[Message]:
        """Follow a session: the messages after `after_seq`, then each new one as it comes, in order, none twice.

        It goes on by itself after a lost connection, a restart of the service and the end of a token, and has no deadline.

        >>> reply = await client.append_messages(user_id=user_id, messages=[message("user", "Hi")])
        >>> async for each in client.watch_messages(user_id=user_id, session_id=reply.session_id):
        ...     print(each.seq, each.content)
        ...     break
        1 Hi

        Raises:
            NotFound: there is no such session, or it was erased meanwhile.
        """
        request = message_pb2.WatchMessagesRequest(
            user_id=user_id, session_id=session_id, after_seq=after_seq
        )
        retry = resumption.ResumeBackoff()
        while True:
            token = await self._get_token(self._timeout)
            try:
                async with aclosing(
                    self._stream(lambda stub: stub.WatchMessages, request, token)
                ) as replies:
                    async for reply in replies:
                        retry.progress()
                        if reply.message.seq > request.after_seq:
                            request.after_seq = reply.message.seq
                            yield reply.message
            except resumption.RESUMABLE as failure:
                if self._closed or not (
                    resumption.can_resume(failure)
                    or (
                        retry.first
                        and await self._refresh_token(failure, token, self._timeout) is not None
                    )
                ):
                    raise
                await retry.pause(failure.retry_after)
            else:
                await retry.pause()
