"""Request and response bodies of the HTTP API."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, Field, StringConstraints

MAX_QUESTION_CHARS = 32_000

RoleName = Literal["user", "assistant", "system", "tool"]


class Error(BaseModel):
    """Why a request failed."""

    detail: str = Field(description="Explanation for people.")
    reason: str = Field(
        description="Stable identifier for programs.", examples=["SESSION_NOT_FOUND"]
    )
    fields: list[str] = Field(
        default=[], description="Rejected fields of the request, each with the reason."
    )


class ChatRequest(BaseModel):
    """A question."""

    message: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_QUESTION_CHARS)
    ] = Field(examples=["How do I back the service up?"])
    session_uuid: UUID | None = Field(
        default=None, description="The conversation. Omit it to start a new one."
    )
    message_id: UUID | None = Field(
        default=None,
        description=(
            "An id chosen by the caller. Repeating a request with the same id stores nothing "
            "twice and returns the same answer."
        ),
    )


class Source(BaseModel):
    """A passage that an answer is based on."""

    document_uuid: UUID
    title: str
    uri: str = Field(default="", description="Origin of the document.")
    chunk_index: int = Field(description="Position of the passage in the document, from 0.")
    text: str = Field(description="The passage.")


class ChatResponse(BaseModel):
    """An answer."""

    answer: str
    session_uuid: UUID | None = Field(
        description="The conversation. Null when a new one could not be saved."
    )
    saved: bool = Field(description="Whether question and answer are both stored.")
    sources: list[Source] = []
    message_id: UUID = Field(description="The question's id.")
    answer_id: UUID = Field(description="The answer's id.")
    title: str | None = Field(
        default=None, description="The conversation's title, if this request started it."
    )
    stopped: bool = Field(default=False, description="Whether the answer is incomplete.")


class BeginEvent(BaseModel):
    """Stream event `begin`: the question was accepted."""

    session_uuid: UUID | None
    message_id: UUID
    answer_id: UUID
    saved: bool = Field(description="Whether the question is stored.")
    title: str | None = None
    sources: list[Source] = []


class DeltaEvent(BaseModel):
    """Stream event `delta`: the next piece of the answer."""

    text: str


class Session(BaseModel):
    """A conversation."""

    session_uuid: UUID
    title: str
    message_count: int
    created_at: datetime
    updated_at: datetime


class SessionPage(BaseModel):
    """Conversations, most recently active first."""

    sessions: list[Session]
    next_page_token: str = Field(description="Empty on the last page.")


class SessionChange(BaseModel):
    """The fields of a conversation that can be changed."""

    title: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=512)]


class Message(BaseModel):
    """A message of a conversation."""

    id: UUID
    seq: int = Field(description="Position in the conversation: 1, 2, 3…")
    role: RoleName
    content: str
    created_at: datetime
    sources: list[Source] = []
    stopped: bool = False


class MessagePage(BaseModel):
    """Messages of a conversation, oldest first unless `newest_first` was set."""

    messages: list[Message]
    next_page_token: str = Field(description="Empty on the last page.")


class Hit(BaseModel):
    """A message that matches a search."""

    session_uuid: UUID
    session_title: str
    message_id: UUID
    seq: int
    role: RoleName
    snippet: str = Field(
        description="Matching text as escaped HTML, with the words between <mark> and </mark>."
    )
    created_at: datetime


class SearchResult(BaseModel):
    """Matching messages, best first."""

    hits: list[Hit]


class Health(BaseModel):
    """State of the database and the search index, checked by this request."""

    status: Literal["ok", "unavailable"]
    database: str = Field(examples=["serving"])
    search: str = Field(examples=["serving"])
    model: str | None = Field(
        description="Name of the language model. Null: answers quote the documents."
    )
