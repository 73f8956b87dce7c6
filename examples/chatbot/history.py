"""Calls to the ChatHistory service that need more than one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chathistory_client import (
    ChatHistoryClient,
    ChatHistoryError,
    DeadlineExceeded,
    Internal,
    Message,
    NotFound,
    Overloaded,
    PermissionDenied,
    Session,
    Unauthenticated,
    Unavailable,
)

from . import convert, schemas
from .settings import Settings

OUTAGE_ERRORS = (
    Unavailable,
    DeadlineExceeded,
    Overloaded,
    Internal,
    Unauthenticated,
    PermissionDenied,
)
"""Errors that the request did not cause. The chat continues and reports that it is not saved."""
MAX_PASSAGES = 4
"""Passages that are searched for an answer."""
MIN_SCORE = 0.2
"""Hits with a lower score are unrelated to the question."""
MAX_QUERY_CHARS = 2000
"""Longer questions are cut for the search: the service accepts 8 KiB of query."""

_log = logging.getLogger(__name__)


def create_client(settings: Settings, **options: Any) -> ChatHistoryClient:
    """Return a client of the service. Use it as a context manager, one for the whole process."""
    token = settings.history_token.get_secret_value() if settings.history_token else None
    return ChatHistoryClient(
        settings.history_target, tls=settings.history_tls, token=token, **options
    )


@dataclass(frozen=True)
class AppendResult:
    """The session and position of appended messages."""

    session_id: str
    first_seq: int
    """Sequence number of the first of the messages."""
    replayed: bool
    """Whether the messages were stored already, by an earlier request with the same ids."""
    session_created: bool


class History:
    """Calls on behalf of one user at a time."""

    def __init__(self, client: ChatHistoryClient) -> None:
        self.client = client
        """For the calls that need no method here."""

    async def append(
        self,
        user_id: str,
        session_id: str,
        messages: Sequence[Message],
        *,
        title: str,
        timeout_s: float | None = None,
    ) -> AppendResult:
        """Append messages to a session.

        An empty `session_id` starts a session with this title. An unknown user is created first.

        Raises:
            NotFound: the session does not exist, or belongs to another user.
            AlreadyExists: a message's id is in use for a message with other content.
        """

        async def attempt() -> AppendResult:
            reply = await self.client.append_messages(
                user_id=user_id,
                session_id=session_id,
                messages=messages,
                session=None if session_id else Session(title=title),
                timeout=timeout_s,
            )
            first = reply.messages[0]
            return AppendResult(reply.session_id, first.seq, first.replayed, reply.session_created)

        try:
            return await attempt()
        except NotFound as error:
            if error.reason != "USER_NOT_FOUND":
                raise
        await self.client.create_user(user_id=user_id, timeout=timeout_s)
        return await attempt()

    async def find_answer(self, user_id: str, session_id: str, answer_id: str) -> Message | None:
        """Return a stored answer, or None if it is not stored."""
        try:
            return await self.client.get_message(
                user_id=user_id, session_id=session_id, message_id=answer_id
            )
        except NotFound:
            return None

    async def find_passages(self, user_id: str, question: str) -> list[schemas.Source] | None:
        """Return the passages of documents that match a question, None while search is unavailable.

        Passages are optional for an answer, so no error of the search fails the turn.
        """
        try:
            hits = await self.client.search_documents(
                user_id=user_id, query=question[:MAX_QUERY_CHARS], limit=MAX_PASSAGES
            )
        except ChatHistoryError as error:
            _log.info("document search failed: %s", error)
            return None
        return [convert.source_body(hit) for hit in hits if hit.score >= MIN_SCORE]
