"""The HTTP endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from chathistory_client import (
    FailedPrecondition,
    HealthStatus,
    MessageHit,
    MessageOrder,
    NotFound,
    SearchMode,
    Unavailable,
    trace_context,
)

from . import convert, schemas
from .error_handlers import error_responses
from .history import MIN_SCORE, History
from .identity import current_user_id, documented_cookie
from .model import Model
from .turns import Turn, TurnRunner

HEALTH_TIMEOUT_S = 1.5
"""Timeout of each check of /db-health; the checks run concurrently."""
DELETE_TIMEOUT_S = 10.0
"""Timeout of deleting a conversation, which takes longer the more messages it has."""
MAX_SEMANTIC_HITS = 5
"""Maximum hits of a search by meaning, used when no message contains the words."""


async def _forward_trace(
    traceparent: Annotated[str | None, Header(include_in_schema=False)] = None,
    tracestate: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> AsyncIterator[None]:
    """Continue the request's trace in calls to the service."""
    with trace_context(traceparent, tracestate):
        yield


def _history(request: Request) -> History:
    history: History = request.app.state.history
    return history


def _turn_runner(request: Request) -> TurnRunner:
    turns: TurnRunner = request.app.state.turns
    return turns


def _model(request: Request) -> Model:
    model: Model = request.app.state.model
    return model


UserId = Annotated[str, Depends(current_user_id)]
HistoryDep = Annotated[History, Depends(_history)]
TurnsDep = Annotated[TurnRunner, Depends(_turn_runner)]
ModelDep = Annotated[Model, Depends(_model)]
PageSize = Annotated[int, Query(ge=1, le=200)]
PageToken = Annotated[
    str, Query(max_length=1024, description="`next_page_token` of the previous page.")
]

router = APIRouter(dependencies=[documented_cookie, Depends(_forward_trace)])
health_router = APIRouter()


async def _begin_turn(body: schemas.ChatRequest, user_id: UserId, turns: TurnsDep) -> Turn:
    # A dependency, so that its errors become HTTP statuses before a stream has started.
    return await turns.begin(user_id, body)


TurnDep = Annotated[Turn, Depends(_begin_turn)]


@router.post("/chat", tags=["chat"], summary="Ask", responses=error_responses(404, 409, 422, 503))
async def chat(turn: TurnDep, turns: TurnsDep) -> schemas.ChatResponse:
    """Answer a question in a conversation and store both.

    While the history service is unavailable the reply is an answer with `saved: false`.
    """
    answer = turns.answer(turn)
    await asyncio.shield(answer.finished)
    return turn.response()


@router.post(
    "/chat/stream",
    tags=["chat"],
    summary="Ask and stream the answer",
    response_class=EventSourceResponse,
    responses=error_responses(404, 409, 422, 503, is_stream=True),
)
async def chat_stream(turn: TurnDep, turns: TurnsDep) -> AsyncIterator[ServerSentEvent]:
    """Like `/chat`, as server-sent events.

    The events are `begin` (BeginEvent), then any number of `delta` (DeltaEvent), then `done`
    (ChatResponse). Closing the connection stops the answer; the text so far is stored.
    """
    answer = turns.answer(turn)
    yield ServerSentEvent(event="begin", data=turn.begin_event())
    async for piece in answer.pieces():
        yield ServerSentEvent(event="delta", data=schemas.DeltaEvent(text=piece))
    yield ServerSentEvent(event="done", data=turn.response())


@router.get(
    "/api/sessions",
    tags=["sessions"],
    summary="List conversations",
    responses=error_responses(422, 503),
)
async def list_sessions(
    user_id: UserId, history: HistoryDep, page_size: PageSize = 30, page_token: PageToken = ""
) -> schemas.SessionPage:
    """List the user's conversations, most recently active first."""
    page = await history.client.list_sessions(
        user_id=user_id, page_size=page_size, page_token=page_token
    )
    return schemas.SessionPage(
        sessions=[convert.session_body(session) for session in page.sessions],
        next_page_token=page.next_page_token,
    )


@router.get(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Get a conversation",
    responses=error_responses(404, 422, 503),
)
async def get_session(user_id: UserId, history: HistoryDep, session_uuid: UUID) -> schemas.Session:
    """Return a conversation's title, times and message count."""
    session = await history.client.get_session(user_id=user_id, session_id=str(session_uuid))
    return convert.session_body(session)


@router.get(
    "/api/sessions/{session_uuid}/messages",
    tags=["sessions"],
    summary="List messages",
    responses=error_responses(404, 422, 503),
)
async def list_messages(
    user_id: UserId,
    history: HistoryDep,
    session_uuid: UUID,
    page_size: PageSize = 50,
    page_token: PageToken = "",
    *,
    newest_first: bool = False,
) -> schemas.MessagePage:
    """List a page of a conversation's messages."""
    page = await history.client.list_messages(
        user_id=user_id,
        session_id=str(session_uuid),
        order=MessageOrder.MESSAGE_ORDER_DESC if newest_first else MessageOrder.MESSAGE_ORDER_ASC,
        page_size=page_size,
        page_token=page_token,
    )
    return schemas.MessagePage(
        messages=[convert.message_body(message) for message in page.messages],
        next_page_token=page.next_page_token,
    )


@router.patch(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Rename a conversation",
    responses=error_responses(404, 422, 503),
)
async def change_session(
    user_id: UserId, history: HistoryDep, session_uuid: UUID, change: schemas.SessionChange
) -> schemas.Session:
    """Change a conversation's title."""
    session = await history.client.update_session(
        user_id=user_id, session_id=str(session_uuid), title=change.title
    )
    return convert.session_body(session)


@router.delete(
    "/api/sessions/{session_uuid}",
    tags=["sessions"],
    summary="Delete a conversation",
    status_code=204,
    responses=error_responses(404, 422, 503),
)
async def delete_session(user_id: UserId, history: HistoryDep, session_uuid: UUID) -> None:
    """Delete a conversation with all its messages."""
    await history.client.delete_session(
        user_id=user_id, session_id=str(session_uuid), timeout=DELETE_TIMEOUT_S
    )


@router.get(
    "/api/search",
    tags=["sessions"],
    summary="Search conversations",
    responses=error_responses(422, 503),
)
async def search(
    user_id: UserId,
    history: HistoryDep,
    q: Annotated[str, Query(min_length=1, max_length=1000, description="Words to search for.")],
    limit: Annotated[int, Query(ge=1, le=50)] = 20,
) -> schemas.SearchResult:
    """Search the messages of all of the user's conversations, best matches first."""
    hits = await _search_messages(history, user_id, q, limit)
    session_ids = {hit.message.session_id for hit in hits}
    titles = dict(
        await asyncio.gather(*(_title(history, user_id, session_id) for session_id in session_ids))
    )
    return schemas.SearchResult(
        hits=[
            convert.hit_body(hit, title)
            for hit in hits
            if (title := titles[hit.message.session_id]) is not None
        ]
    )


async def _search_messages(
    history: History, user_id: str, query: str, limit: int
) -> Sequence[MessageHit]:
    hits = await history.client.search_messages(
        user_id=user_id, query=query, limit=limit, mode=SearchMode.SEARCH_MODE_LEXICAL
    )
    if hits:
        return hits
    # No message contains the words. Search by meaning, unless the service does not offer it.
    with suppress(FailedPrecondition, Unavailable):
        hits = await history.client.search_messages(
            user_id=user_id,
            query=query,
            limit=min(limit, MAX_SEMANTIC_HITS),
            mode=SearchMode.SEARCH_MODE_SEMANTIC,
        )
    return [hit for hit in hits if hit.score >= MIN_SCORE]


async def _title(history: History, user_id: str, session_id: str) -> tuple[str, str | None]:
    """Return a session's id and its title, None if it has just been deleted."""
    try:
        session = await history.client.get_session(user_id=user_id, session_id=session_id)
    except NotFound:
        return session_id, None
    return session_id, session.title or convert.UNTITLED


@health_router.get(
    "/db-health",
    tags=["health"],
    summary="Check the database",
    responses={
        503: {
            "model": schemas.Health,
            "description": "The database or the history service is unavailable.",
        }
    },
)
async def db_health(history: HistoryDep, model: ModelDep, response: Response) -> schemas.Health:
    """Make a round trip to the database.

    This is for people. A periodic probe would keep a serverless database from being suspended.
    """
    database, search_index = await asyncio.gather(
        history.client.check_health("database", timeout=HEALTH_TIMEOUT_S),
        history.client.check_health("search", timeout=HEALTH_TIMEOUT_S),
    )
    is_serving = database is HealthStatus.SERVING
    response.status_code = 200 if is_serving else 503
    response.headers["cache-control"] = "no-store"
    return schemas.Health(
        status="ok" if is_serving else "unavailable",
        database=database.value,
        search=search_index.value,
        model=model.name,
    )
