"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from chathistory_client import (
    FailedPrecondition,
    HealthStatus,
    MessageOrder,
    NotFound,
    SearchMode,
    Unavailable,
    trace_context,
)

from . import history, schemas
from .history import MIN_SCORE, History
from .identity import documented, user_id
from .model import Model
from .problems import responses
from .turns import Turn, Turns

HEALTH_TIMEOUT = 1.5
"""Seconds for the whole of /db-health."""
DELETE_TIMEOUT = 10.0
"""Seconds that erasing a conversation may take, however long it is."""
BY_MEANING = 5
"""How many messages are shown that have none of the words."""


async def _traced(
    traceparent: Annotated[str | None, Header(include_in_schema=False)] = None,
    tracestate: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> AsyncIterator[None]:
    """Pass the request's trace on to the service."""
    with trace_context(traceparent, tracestate):
        yield


def _history(request: Request) -> History:
    found: History = request.app.state.history
    return found


def _turns(request: Request) -> Turns:
    found: Turns = request.app.state.turns
    return found


def _model(request: Request) -> Model:
    found: Model = request.app.state.model
    return found


UserId = Annotated[str, Depends(user_id)]
Store = Annotated[History, Depends(_history)]
PageSize = Annotated[int, Query(ge=1, le=200)]
PageToken = Annotated[
    str, Query(max_length=1024, description="`next_page_token` of the page before.")
]

router = APIRouter(dependencies=[documented, Depends(_traced)])
health = APIRouter()


async def _begin(
    body: schemas.ChatRequest, user: UserId, turns: Annotated[Turns, Depends(_turns)]
) -> Turn:
    # A dependency, so that what fails here fails before a stream has begun.
    return await turns.begin(user, body)


Begun = Annotated[Turn, Depends(_begin)]


@router.post("/chat", tags=["chat"], summary="Ask", responses=responses(404, 409, 422, 503))
async def chat(turn: Begun, turns: Annotated[Turns, Depends(_turns)]) -> schemas.ChatResponse:
    """Answer a question in a conversation, and store both.

    While the history service is away the answer comes all the same, with `saved: false`.
    """
    answering = turns.answer(turn)
    await asyncio.shield(answering.ended)
    return turn.done()


@router.post(
    "/chat/stream",
    tags=["chat"],
    summary="Ask, and be answered word by word",
    response_class=EventSourceResponse,
    responses=responses(404, 409, 422, 503, of_stream=True),
)
async def chat_stream(
    turn: Begun, turns: Annotated[Turns, Depends(_turns)]
) -> AsyncIterator[ServerSentEvent]:
    """Like `/chat`, by server-sent events: `begin` (Begun), then `delta` (Delta) many times, then `done` (ChatResponse).

    Whoever stops listening breaks the answer off; what there is of it is stored.
    """
    answering = turns.answer(turn)
    yield ServerSentEvent(event="begin", data=turn.begun())
    async for piece in answering.pieces():
        yield ServerSentEvent(event="delta", data=schemas.Delta(text=piece))
    yield ServerSentEvent(event="done", data=turn.done())


@router.get(
    "/api/sessions", tags=["sessions"], summary="List conversations", responses=responses(422, 503)
)
async def list_sessions(
    user: UserId, store: Store, page_size: PageSize = 30, page_token: PageToken = ""
) -> schemas.SessionPage:
    """List one's conversations, newest activity first."""
    try:
        page = await store.client.list_sessions(
            user_id=user, page_size=page_size, page_token=page_token
        )
    except NotFound:  # Nobody is made a user by looking.
        return schemas.SessionPage(sessions=[], next_page_token="")
    return schemas.SessionPage(
        sessions=[history.session_out(each) for each in page.sessions],
        next_page_token=page.next_page_token,
    )


@router.get(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Read a conversation's head",
    responses=responses(404, 422, 503),
)
async def get_session(user: UserId, store: Store, session_uuid: UUID) -> schemas.Session:
    """Read one conversation's title and times."""
    return history.session_out(
        await store.client.get_session(user_id=user, session_id=str(session_uuid))
    )


@router.get(
    "/api/sessions/{session_uuid}/messages",
    tags=["sessions"],
    summary="Read a conversation",
    responses=responses(404, 422, 503),
)
async def list_messages(
    user: UserId,
    store: Store,
    session_uuid: UUID,
    page_size: PageSize = 50,
    page_token: PageToken = "",
    *,
    newest_first: bool = False,
) -> schemas.MessagePage:
    """Read a page of a conversation's messages in order."""
    page = await store.client.list_messages(
        user_id=user,
        session_id=str(session_uuid),
        order=MessageOrder.MESSAGE_ORDER_DESC if newest_first else MessageOrder.MESSAGE_ORDER_ASC,
        page_size=page_size,
        page_token=page_token,
    )
    return schemas.MessagePage(
        messages=[history.message_out(each) for each in page.messages],
        next_page_token=page.next_page_token,
    )


@router.patch(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Rename a conversation",
    responses=responses(404, 422, 503),
)
async def change_session(
    user: UserId, store: Store, session_uuid: UUID, change: schemas.SessionChange
) -> schemas.Session:
    """Give a conversation another title."""
    changed = await store.client.update_session(
        user_id=user, session_id=str(session_uuid), title=change.title
    )
    return history.session_out(changed)


@router.delete(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Delete a conversation",
    status_code=204,
    responses=responses(404, 422, 503),
)
async def delete_session(user: UserId, store: Store, session_uuid: UUID) -> None:
    """Erase a conversation with all its messages."""
    await store.client.delete_session(
        user_id=user, session_id=str(session_uuid), timeout=DELETE_TIMEOUT
    )


@router.get(
    "/api/search",
    tags=["sessions"],
    summary="Search one's conversations",
    responses=responses(422, 503),
)
async def search(
    user: UserId,
    store: Store,
    q: Annotated[str, Query(min_length=1, max_length=1000, description="What is looked for.")],
    limit: Annotated[int, Query(ge=1, le=50)] = 20,
) -> schemas.SearchResult:
    """Find messages in all of one's conversations, best first."""
    try:
        hits = await store.client.search_messages(
            user_id=user, query=q, limit=limit, mode=SearchMode.SEARCH_MODE_LEXICAL
        )
        if not hits:  # No such words: what is near in meaning, where that can be told.
            with suppress(FailedPrecondition, Unavailable):
                near = await store.client.search_messages(
                    user_id=user,
                    query=q,
                    limit=min(limit, BY_MEANING),
                    mode=SearchMode.SEARCH_MODE_SEMANTIC,
                )
                hits = [hit for hit in near if hit.score >= MIN_SCORE]
    except NotFound:
        return schemas.SearchResult(hits=[])
    session_ids = {hit.message.session_id for hit in hits}
    titles = dict(await asyncio.gather(*(_title(store, user, each) for each in session_ids)))
    return schemas.SearchResult(
        hits=[
            schemas.Hit.model_validate(
                {
                    "session_uuid": hit.message.session_id,
                    "session_title": titles[hit.message.session_id],
                    "message_id": hit.message.id,
                    "seq": hit.message.seq,
                    "role": history.role(hit.message),
                    "snippet": hit.snippet,
                    "created_at": history.message_out(hit.message).created_at,
                }
            )
            for hit in hits
            if titles[hit.message.session_id] is not None
        ]
    )


async def _title(store: History, user: str, session_id: str) -> tuple[str, str | None]:
    try:
        found = await store.client.get_session(user_id=user, session_id=session_id)
    except NotFound:  # Deleted this moment.
        return session_id, None
    return session_id, found.title or "Untitled"


@health.get(
    "/db-health",
    tags=["health"],
    summary="Ask the database",
    responses={
        503: {
            "model": schemas.Health,
            "description": "The database, or the history service, does not answer.",
        }
    },
)
async def db_health(
    store: Store, model: Annotated[Model, Depends(_model)], response: Response
) -> schemas.Health:
    """Make a real round trip to the database. For people; as a periodic probe it would keep a suspended database awake."""
    database, found = await asyncio.gather(
        store.client.check_health("database", timeout=HEALTH_TIMEOUT),
        store.client.check_health("search", timeout=HEALTH_TIMEOUT),
    )
    serving = database is HealthStatus.SERVING
    response.status_code = 200 if serving else 503
    response.headers["cache-control"] = "no-store"
    return schemas.Health(
        status="ok" if serving else "unavailable",
        database=database.value,
        search=found.value,
        model=model.name,
    )
