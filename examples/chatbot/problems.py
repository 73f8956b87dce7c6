"""How what goes wrong is told: one body for all, described in OpenAPI."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from chathistory_client import (
    AlreadyExists,
    ChatHistoryError,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    Unavailable,
)

from .schemas import Error

_log = logging.getLogger(__name__)

_STATUS: dict[type[ChatHistoryError], int] = {
    InvalidArgument: 422,
    NotFound: 404,
    AlreadyExists: 409,
    Conflict: 409,
    FailedPrecondition: 409,
    Overloaded: 503,
    Unavailable: 503,
    DeadlineExceeded: 503,
}
_NOT_NOW = 503
RETRY_AFTER = 2


def responses(*codes: int, of_stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Describe errors in OpenAPI; those of a stream, too, are JSON."""
    words = {
        404: "There is no such conversation, or it is somebody else's: nobody can tell which.",
        409: "The message id stands for another message, or the conversation was changed or closed meanwhile.",
        422: "The request itself is wrong; `fields` says where.",
        503: "The history service, or its database, does not answer; `Retry-After` says when to come back.",
    }
    body: dict[str, Any] = {"model": Error}
    if of_stream:
        body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {code: body | {"description": words[code]} for code in codes}


def install(app: FastAPI) -> None:
    """Answer every error of the service, and every malformed request, in one form."""

    @app.exception_handler(ChatHistoryError)
    async def _history(_request: Request, error: ChatHistoryError) -> JSONResponse:
        status = _STATUS.get(type(error), 502)
        if status >= 500:  # noqa: PLR2004 - the server's own
            _log.warning("history: %s", error)
        if status == 502:  # noqa: PLR2004 - its words are for us, not for whoever asks
            return _answer(
                status,
                Error(
                    detail="the history service has failed", reason=error.reason or "HISTORY_FAILED"
                ),
            )
        fields = [f"{found.field}: {found.description}" for found in error.violations]
        return _answer(
            status,
            Error(detail=error.message, reason=error.reason or error.code.name, fields=fields),
        )

    @app.exception_handler(RequestValidationError)
    async def _malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        fields = [
            f"{'.'.join(map(str, found['loc'][1:]))}: {found['msg']}" for found in error.errors()
        ]
        return _answer(
            422, Error(detail="; ".join(fields), reason="FIELD_VIOLATION", fields=fields)
        )


def _answer(status: int, error: Error) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER)} if status == _NOT_NOW else None
    return JSONResponse(error.model_dump(), status, headers)
