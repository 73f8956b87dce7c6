"""Maps errors of the service to HTTP responses with one body, described in OpenAPI."""

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

RETRY_AFTER_S = 2

_STATUS_CODES: dict[type[ChatHistoryError], int] = {
    InvalidArgument: 422,
    NotFound: 404,
    AlreadyExists: 409,
    Conflict: 409,
    FailedPrecondition: 409,
    Overloaded: 503,
    Unavailable: 503,
    DeadlineExceeded: 503,
}
_BAD_GATEWAY = 502
_SERVICE_UNAVAILABLE = 503
_DESCRIPTIONS = {
    404: "The conversation does not exist or belongs to another user. The reply is the same.",
    409: (
        "The message id is in use for another message, or the conversation was changed or closed "
        "concurrently."
    ),
    422: "The request is invalid; `fields` lists the fields and the reasons.",
    503: (
        "The history service or its database is unavailable; `Retry-After` is the wait in seconds."
    ),
}
_log = logging.getLogger(__name__)


def error_responses(*codes: int, is_stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's errors. A stream's errors are JSON as well."""
    body: dict[str, Any] = {"model": Error}
    if is_stream:
        body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {code: body | {"description": _DESCRIPTIONS[code]} for code in codes}


def install(app: FastAPI) -> None:
    """Register the handlers of the service's errors and of invalid requests."""

    @app.exception_handler(ChatHistoryError)
    async def _history_error(_request: Request, error: ChatHistoryError) -> JSONResponse:
        status = _STATUS_CODES.get(type(error), _BAD_GATEWAY)
        if status in (_BAD_GATEWAY, _SERVICE_UNAVAILABLE):
            _log.warning("history service: %s", error)
        if status == _BAD_GATEWAY:  # The message is for this log, not for the caller.
            reason = error.reason or "HISTORY_FAILED"
            return _response(status, Error(detail="the history service failed", reason=reason))
        fields = [f"{violation.field}: {violation.description}" for violation in error.violations]
        reason = error.reason or error.code.name
        return _response(status, Error(detail=error.message, reason=reason, fields=fields))

    @app.exception_handler(RequestValidationError)
    async def _invalid_request(_request: Request, error: RequestValidationError) -> JSONResponse:
        fields = [
            f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors()
        ]
        detail = "; ".join(fields)
        return _response(422, Error(detail=detail, reason="FIELD_VIOLATION", fields=fields))


def _response(status: int, error: Error) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == _SERVICE_UNAVAILABLE else None
    return JSONResponse(error.model_dump(), status, headers)
