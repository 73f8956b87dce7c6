"""Identifies users by a signed cookie with their id. A request without the cookie gets a new id."""

from __future__ import annotations

from http.cookies import SimpleCookie
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import APIKeyCookie
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chathistory_client import new_id

COOKIE = "chatbot_user"
_COOKIE_MAX_AGE_S = 365 * 24 * 3600
_ANONYMOUS_PATHS = ("/static/", "/db-health", "/docs", "/openapi.json")


class IdentityMiddleware:
    """Puts `user_id` into the request's state.

    It is plain ASGI middleware: Starlette's BaseHTTPMiddleware would wrap streamed responses.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._signer = URLSafeSerializer(secret, salt="chatbot.user")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_ANONYMOUS_PATHS):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        known_id = self._verified_id(request.cookies.get(COOKIE, ""))
        user_id = known_id or new_id()
        scope.setdefault("state", {})["user_id"] = user_id

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                cookie = self._cookie(user_id, secure=request.url.scheme == "https")
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self._app(scope, receive, send if known_id else send_with_cookie)

    def _verified_id(self, cookie_value: str) -> str | None:
        try:
            return str(UUID(self._signer.loads(cookie_value)))
        except (BadSignature, ValueError, TypeError, AttributeError):
            return None

    def _cookie(self, user_id: str, *, secure: bool) -> str:
        cookie = SimpleCookie({COOKIE: str(self._signer.dumps(user_id))})
        cookie[COOKIE].update({"path": "/", "max-age": str(_COOKIE_MAX_AGE_S), "samesite": "Lax"})
        cookie[COOKIE]["httponly"] = True
        if secure:
            cookie[COOKIE]["secure"] = True
        return cookie[COOKIE].OutputString()


def current_user_id(request: Request) -> str:
    """Return the id of the user who sent the request."""
    return str(request.state.user_id)


# Only describes the cookie in OpenAPI: the middleware has already read it.
documented_cookie = Depends(
    APIKeyCookie(
        name=COOKIE, auto_error=False, description="Set on the first response to a new user."
    )
)
