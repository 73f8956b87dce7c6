"""What goes over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, Field, StringConstraints

MAX_QUESTION = 32_000


class Error(BaseModel):
    """Why a request failed."""

    detail: str = Field(description="In words, for people.")
    reason: str = Field(description="Stable, for programs.", examples=["SESSION_NOT_FOUND"])
    fields: list[str] = Field(default=[], description="What of the request was refused, and why.")


class ChatRequest(BaseModel):
    """A question."""

    message: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_QUESTION)
    ] = Field(examples=["How do I back the service up?"])
    session_uuid: UUID | None = Field(
        default=None, description="The conversation; none starts a new one."
    )
    message_id: UUID | None = Field(
        default=None,
        description="An id of your own: the same request again stores nothing twice and gets the same answer.",
    )


class Source(BaseModel):
    """A passage that an answer stands on."""

    document_uuid: UUID
    title: str
    uri: str = Field(default="", description="Where the document came from.")
    chunk_index: int = Field(description="The passage's place in the document, from 0.")
    text: str = Field(description="The passage.")


class ChatResponse(BaseModel):
    """An answer."""

    answer: str
    session_uuid: UUID | None = Field(
        description="The conversation; null when a new one could not be saved."
    )
    saved: bool = Field(description="Whether question and answer are both stored.")
    sources: list[Source] = []
    message_id: UUID = Field(description="The question's id.")
    answer_id: UUID = Field(description="The answer's id.")
    title: str | None = Field(
        default=None, description="The conversation's title, when this request has started it."
    )
    stopped: bool = Field(default=False, description="Whether the answer broke off before its end.")


class Begun(BaseModel):
    """Stream event `begin`: the question has been taken."""

    session_uuid: UUID | None
    message_id: UUID
    answer_id: UUID
    saved: bool = Field(description="Whether the question is stored.")
    title: str | None = None
    sources: list[Source] = []


class Delta(BaseModel):
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
    """Conversations, newest activity first."""

    sessions: list[Session]
    next_page_token: str = Field(description="Empty on the last page.")


class SessionChange(BaseModel):
    """What can be changed in a conversation."""

    title: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=512)]


class Message(BaseModel):
    """A message of a conversation."""

    id: UUID
    seq: int = Field(description="Its place: 1, 2, 3…")
    role: Literal["user", "assistant", "system", "tool"]
    content: str
    created_at: datetime
    sources: list[Source] = []
    stopped: bool = False


class MessagePage(BaseModel):
    """Messages in order."""

    messages: list[Message]
    next_page_token: str = Field(description="Empty on the last page.")


class Hit(BaseModel):
    """A message that was found."""

    session_uuid: UUID
    session_title: str
    message_id: UUID
    seq: int
    role: Literal["user", "assistant", "system", "tool"]
    snippet: str = Field(
        description="What fits, as HTML: escaped, with the words between <mark> and </mark>."
    )
    created_at: datetime


class SearchResult(BaseModel):
    """What was found, best first."""

    hits: list[Hit]


class Health(BaseModel):
    """How the database is, asked now."""

    status: Literal["ok", "unavailable"]
    database: str = Field(examples=["serving"])
    search: str = Field(examples=["serving"])
    model: str | None = Field(
        description="The language model; null: the answer is what the documents say."
    )
