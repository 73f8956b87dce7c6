"""Who somebody is: a signed cookie with their user id. Whoever has none gets a new one."""

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
_YEAR = 365 * 24 * 3600
_ANONYMOUS_PATHS = ("/static/", "/db-health", "/docs", "/openapi.json")


class Identity:
    """Middleware that puts `user_id` into the request's state. It works on the bare protocol, so that streams stay streams."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._signer = URLSafeSerializer(secret, salt="chatbot.user")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_ANONYMOUS_PATHS):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        known = self._read(request.cookies.get(COOKIE, ""))
        user_id = known or new_id()
        scope.setdefault("state", {})["user_id"] = user_id

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and known is None:
                headers = MutableHeaders(scope=message)
                headers.append(
                    "set-cookie", self._cookie(user_id, secure=request.url.scheme == "https")
                )
            await send(message)

        await self._app(scope, receive, send_with_cookie)

    def _read(self, value: str) -> str | None:
        try:
            return str(UUID(self._signer.loads(value)))
        except (BadSignature, ValueError, TypeError, AttributeError):
            return None

    def _cookie(self, user_id: str, *, secure: bool) -> str:
        cookie = SimpleCookie({COOKIE: str(self._signer.dumps(user_id))})
        cookie[COOKIE].update({"path": "/", "max-age": str(_YEAR), "samesite": "Lax"})
        cookie[COOKIE]["httponly"] = True
        if secure:
            cookie[COOKIE]["secure"] = True
        return cookie[COOKIE].OutputString()


def user_id(request: Request) -> str:
    """Return whose request this is."""
    return str(request.state.user_id)


# For the description of the API: the cookie itself was read before.
documented = Depends(
    APIKeyCookie(name=COOKIE, auto_error=False, description="Given to whoever comes without one.")
)
