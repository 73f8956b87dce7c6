"""What the chatbot asks of the ChatHistory service, and what it makes of the service being away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import UUID

from google.protobuf.json_format import MessageToDict

from chathistory_client import (
    ChatHistoryClient,
    ChatHistoryError,
    Citation,
    DeadlineExceeded,
    DocumentHit,
    Internal,
    Message,
    NotFound,
    Overloaded,
    Part,
    PermissionDenied,
    Role,
    Unauthenticated,
    Unavailable,
)
from chathistory_client import Session as StoredSession

from . import schemas

AWAY = (Unavailable, DeadlineExceeded, Overloaded, Internal, Unauthenticated, PermissionDenied)
"""Errors that say nothing about the request: the chat goes on, and says that it is not saved."""
MAX_PASSAGES = 4
MIN_SCORE = 0.2
"""Passages farther off than this say nothing about the question."""
QUOTE = 1000
"""Characters of a passage that are kept with an answer."""
TITLE = 60

_ROLES: dict[int, Literal["user", "assistant", "system", "tool"]] = {
    Role.ROLE_USER: "user",
    Role.ROLE_ASSISTANT: "assistant",
    Role.ROLE_SYSTEM: "system",
    Role.ROLE_TOOL: "tool",
}
_log = logging.getLogger(__name__)


class Appended:
    """Where a message stands."""

    def __init__(self, session_id: str, seq: int, *, replayed: bool, started: bool) -> None:
        self.session_id = session_id
        self.seq = seq
        self.replayed = replayed
        self.started = started
        """Whether this has started the session."""


class History:
    """One user's things at a time; each method is one call or two."""

    def __init__(self, client: ChatHistoryClient) -> None:
        self.client = client

    async def append(
        self,
        user_id: str,
        session_id: str,
        messages: Sequence[Message],
        *,
        title: str,
        timeout: float | None = None,
    ) -> Appended:
        """Append messages, the first of which may start the session; a user who is not known yet is made.

        Raises:
            NotFound: there is no such session.
            AlreadyExists: a message's id stands for something else.
        """
        for last in (False, True):
            try:
                reply = await self.client.append_messages(
                    user_id=user_id,
                    session_id=session_id,
                    messages=messages,
                    session=None if session_id else StoredSession(title=title),
                    timeout=timeout,
                )
            except NotFound as error:
                if last or error.reason != "USER_NOT_FOUND":
                    raise
                await self.client.create_user(user_id=user_id, timeout=timeout)
            else:
                first = reply.messages[0]
                return Appended(
                    reply.session_id,
                    first.seq,
                    replayed=first.replayed,
                    started=reply.session_created,
                )
        raise AssertionError("unreachable")

    async def answer(self, user_id: str, session_id: str, answer_id: str) -> Message | None:
        """Return an answer that is stored, None when it is not."""
        try:
            return await self.client.get_message(
                user_id=user_id, session_id=session_id, message_id=answer_id
            )
        except NotFound:
            return None

    async def passages(self, user_id: str, question: str) -> list[schemas.Source] | None:
        """Find what the documents say; None when they cannot be searched now."""
        try:
            hits = await self.client.search_documents(
                user_id=user_id, query=question[:2000], limit=MAX_PASSAGES
            )
        except ChatHistoryError as error:
            _log.info("no passages: %s", error)
            return None
        return [_source(hit) for hit in hits if hit.score >= MIN_SCORE]


def _source(hit: DocumentHit) -> schemas.Source:
    title, text = hit.document.title or "Untitled", hit.text
    if text.startswith("#"):  # A section: its heading says what the passage is about.
        heading, _, text = text.partition("\n")
        title = f"{title}: {heading.lstrip('# ')}"
    return schemas.Source(
        document_uuid=UUID(hit.document.id),
        title=title,
        uri=hit.document.source_uri,
        chunk_index=hit.chunk_index,
        text=text.strip()[:QUOTE],
    )


def cited(sources: Sequence[schemas.Source]) -> list[Part]:
    """Return sources as an answer keeps them."""
    return [
        Part(
            citation=Citation(
                document_id=str(source.document_uuid),
                chunk_index=source.chunk_index,
                quote=source.text[:QUOTE],
            )
        )
        for source in sources
    ]


def titles(sources: Sequence[schemas.Source]) -> list[dict[str, str]]:
    """Return the passages' titles, which a citation has no room for, as an answer's metadata keeps them."""
    return [{"title": source.title, "uri": source.uri[:500]} for source in sources]


def sources_of(message: Message) -> list[schemas.Source]:
    """Read the sources of a stored answer."""
    citations = [part.citation for part in message.parts if part.WhichOneof("kind") == "citation"]
    named = _plain(message).get("sources", [])
    named += [{}] * (len(citations) - len(named))
    return [
        schemas.Source(
            document_uuid=UUID(citation.document_id),
            title=name.get("title", "Untitled"),
            uri=name.get("uri", ""),
            chunk_index=citation.chunk_index,
            text=citation.quote,
        )
        for citation, name in zip(citations, named, strict=False)
    ]


def stopped(message: Message) -> bool:
    """Whether a stored answer broke off."""
    return bool(_plain(message).get("stopped", False))


def message_out(message: Message) -> schemas.Message:
    """Return a stored message as the page gets it."""
    return schemas.Message(
        id=UUID(message.id),
        seq=message.seq,
        role=role(message),
        content=message.content,
        created_at=_time(message),
        sources=sources_of(message),
        stopped=stopped(message),
    )


def session_out(session: StoredSession) -> schemas.Session:
    """Return a stored session as the page gets it."""
    return schemas.Session(
        session_uuid=UUID(session.id),
        title=session.title or "Untitled",
        message_count=session.message_count,
        created_at=_time(session),
        updated_at=_time(session, "update_time"),
    )


def role(message: Message) -> Literal["user", "assistant", "system", "tool"]:
    """Return who speaks."""
    return _ROLES[message.role]


def title_of(question: str) -> str:
    """Return a title for a conversation that begins with this question."""
    line = " ".join(question.split())
    if len(line) <= TITLE:
        return line
    return (line[:TITLE].rsplit(" ", 1)[0] or line[:TITLE]).rstrip(" ,;:.-") + "…"


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message.metadata) if message.HasField("metadata") else {}


def _time(thing: Message | StoredSession, field: str = "create_time") -> datetime:
    return cast("datetime", getattr(thing, field).ToDatetime(tzinfo=UTC))
