"""Converts between the service's messages and the HTTP API's bodies."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from google.protobuf.json_format import MessageToDict

from chathistory_client import Citation, DocumentHit, MessageHit, Part, Role
from chathistory_client import Message as StoredMessage
from chathistory_client import Session as StoredSession

from . import schemas

MAX_QUOTE_CHARS = 1000
"""Characters of a passage that are stored with an answer."""
MAX_TITLE_CHARS = 60
UNTITLED = "Untitled"
_MAX_URI_CHARS = 500

_ROLE_NAMES: dict[int, schemas.RoleName] = {
    Role.ROLE_USER: "user",
    Role.ROLE_ASSISTANT: "assistant",
    Role.ROLE_SYSTEM: "system",
    Role.ROLE_TOOL: "tool",
}


def session_body(session: StoredSession) -> schemas.Session:
    """Convert a stored session."""
    return schemas.Session(
        session_uuid=UUID(session.id),
        title=session.title or UNTITLED,
        message_count=session.message_count,
        created_at=_time(session, "create_time"),
        updated_at=_time(session, "update_time"),
    )


def message_body(message: StoredMessage) -> schemas.Message:
    """Convert a stored message."""
    return schemas.Message(
        id=UUID(message.id),
        seq=message.seq,
        role=role_name(message),
        content=message.content,
        created_at=_time(message, "create_time"),
        sources=stored_sources(message),
        stopped=is_stopped(message),
    )


def hit_body(hit: MessageHit, session_title: str) -> schemas.Hit:
    """Convert a message that a search has returned."""
    return schemas.Hit(
        session_uuid=UUID(hit.message.session_id),
        session_title=session_title,
        message_id=UUID(hit.message.id),
        seq=hit.message.seq,
        role=role_name(hit.message),
        snippet=hit.snippet,
        created_at=_time(hit.message, "create_time"),
    )


def source_body(hit: DocumentHit) -> schemas.Source:
    """Convert a passage of a document that a search has returned."""
    title, text = hit.document.title or UNTITLED, hit.text
    if text.startswith("#"):  # The heading of a section names the passage's topic.
        heading, _, text = text.partition("\n")
        title = f"{title}: {heading.lstrip('# ')}"
    return schemas.Source(
        document_uuid=UUID(hit.document.id),
        title=title,
        uri=hit.document.source_uri,
        chunk_index=hit.chunk_index,
        text=text.strip()[:MAX_QUOTE_CHARS],
    )


def role_name(message: StoredMessage) -> schemas.RoleName:
    """Return the name of a message's role."""
    return _ROLE_NAMES[message.role]


def citation_parts(sources: Sequence[schemas.Source]) -> list[Part]:
    """Return an answer's sources as parts of its message."""
    return [
        Part(
            citation=Citation(
                document_id=str(source.document_uuid),
                chunk_index=source.chunk_index,
                quote=source.text[:MAX_QUOTE_CHARS],
            )
        )
        for source in sources
    ]


def answer_metadata(sources: Sequence[schemas.Source], *, stopped: bool) -> dict[str, Any]:
    """Return an answer's metadata: titles and URIs of its sources, which a citation cannot hold."""
    titles = [{"title": source.title, "uri": source.uri[:_MAX_URI_CHARS]} for source in sources]
    return {"sources": titles} | ({"stopped": True} if stopped else {})


def stored_sources(message: StoredMessage) -> list[schemas.Source]:
    """Return the sources of a stored answer: the reverse of the two functions above."""
    citations = [part.citation for part in message.parts if part.WhichOneof("kind") == "citation"]
    titles = _metadata(message).get("sources", [])
    titles += [{}] * (len(citations) - len(titles))
    return [
        schemas.Source(
            document_uuid=UUID(citation.document_id),
            title=title.get("title", UNTITLED),
            uri=title.get("uri", ""),
            chunk_index=citation.chunk_index,
            text=citation.quote,
        )
        for citation, title in zip(citations, titles, strict=False)
    ]


def is_stopped(message: StoredMessage) -> bool:
    """Whether a stored answer is incomplete."""
    return bool(_metadata(message).get("stopped", False))


def title_from_question(question: str) -> str:
    """Return a title for a conversation that starts with this question."""
    line = " ".join(question.split())
    if len(line) <= MAX_TITLE_CHARS:
        return line
    cut = line[:MAX_TITLE_CHARS]
    return (cut.rsplit(" ", 1)[0] or cut).rstrip(" ,;:.-") + "…"


def _metadata(message: StoredMessage) -> dict[str, Any]:
    return MessageToDict(message.metadata) if message.HasField("metadata") else {}


def _time(stored: StoredMessage | StoredSession, field: str) -> datetime:
    return cast("datetime", getattr(stored, field).ToDatetime(tzinfo=UTC))
