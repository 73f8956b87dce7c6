"""The audit trail: a line for each erasure, each export, each act of a service for a user, and each refused reach for another's things.

It tells ids and outcomes, never content. An erasure and an export are always told. An act for a user is told once an hour for each
service, user and method, and only where callers have names (by token or certificate): a line for every append would cost more than
the append's share of the database, and one an hour answers who worked with whose data when.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from inspect import isasyncgenfunction
from typing import Any

from service.auth.caller import Caller, authorise, is_uuid
from service.errors import PermissionDenied, ServiceError
from service.rpc.pipeline import Call
from service.telemetry import audit

AGAIN_SECONDS = 3600.0
"""How long the same act is not told again."""
MAX_REMEMBERED = 100_000
"""Acts remembered; beyond that the oldest may be told again."""

_IDS = ("user_id", "session_id", "message_id", "document_id")
_MAX_TEXT = 256

Unary = Callable[[Any, Call], Awaitable[Any]]
Stream = Callable[[Any, Call], AsyncGenerator[Any]]


class Audited:
    """A servicer's methods, audited."""

    def __init__(self, servicer: object, *, identified: bool) -> None:
        """Wrap a servicer.

        Args:
            servicer: Whose methods.
            identified: Whether callers have shown who they are; without that, who acts for whom cannot be told.
        """
        self._servicer = servicer
        self._identified = identified
        self._told: dict[tuple[str, str, str], float] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)
        if name.startswith("Delete"):
            return self._always("erase", name, method)
        if name.startswith("Export"):
            return self._always_stream("export", name, method)
        if not self._identified:
            return method
        return (
            self._at_times_stream(name, method)
            if isasyncgenfunction(method)
            else self._at_times(name, method)
        )

    def authorise(self, name: str, caller: Caller, request: Any) -> None:
        """Refuse what a user may not ask for, and tell of it.

        Raises:
            PermissionDenied: as `auth.authorise`.
        """
        try:
            authorise(name, caller, request)
        except PermissionDenied as error:
            self._denied(name, request, caller, error)
            raise

    def _always(self, act: str, name: str, method: Unary) -> Unary:
        async def audited(request: Any, call: Call) -> Any:
            with _told(act, name, request, call):
                return await method(request, call)

        return audited

    def _always_stream(self, act: str, name: str, method: Stream) -> Stream:
        async def audited(request: Any, call: Call) -> AsyncGenerator[Any]:
            with _told(act, name, request, call):
                async with aclosing(method(request, call)) as replies:
                    async for reply in replies:
                        yield reply

        return audited

    def _at_times(self, name: str, method: Unary) -> Unary:
        async def audited(request: Any, call: Call) -> Any:
            if call.caller.user_id is None:
                self._act(name, request, call.caller)
            try:
                return await method(request, call)
            except PermissionDenied as error:
                self._denied(name, request, call.caller, error)
                raise

        return audited

    def _at_times_stream(self, name: str, method: Stream) -> Stream:
        async def audited(request: Any, call: Call) -> AsyncGenerator[Any]:
            if call.caller.user_id is None:
                self._act(name, request, call.caller)
            try:
                async with aclosing(method(request, call)) as replies:
                    async for reply in replies:
                        yield reply
            except PermissionDenied as error:
                self._denied(name, request, call.caller, error)
                raise

        return audited

    def _act(self, name: str, request: Any, caller: Caller) -> None:
        if self._is_new(caller.subject, name, getattr(request, "user_id", "")):
            _tell("act", name, request, caller, "allowed")

    def _denied(self, name: str, request: Any, caller: Caller, error: PermissionDenied) -> None:
        if self._is_new(caller.subject, name, "denied"):
            _tell("denied", name, request, caller, error.reason)

    def _is_new(self, subject: str, name: str, user_id: str) -> bool:
        now = time.monotonic()
        key = (subject[:_MAX_TEXT], name, user_id)
        told_at = self._told.get(key)
        if told_at is not None and now - told_at < AGAIN_SECONDS:
            return False
        self._told.pop(key, None)
        self._told[key] = now
        if len(self._told) > MAX_REMEMBERED:
            del self._told[next(iter(self._told))]
        return True


@contextmanager
def _told(act: str, name: str, request: Any, call: Call) -> Iterator[None]:
    """Tell how an act has ended."""
    try:
        yield
    except BaseException as error:
        _tell(act, name, request, call.caller, _outcome(error))
        raise
    _tell(act, name, request, call.caller, "OK")


def _outcome(error: BaseException) -> str:
    if isinstance(error, ServiceError):
        return error.reason
    return "INTERNAL" if isinstance(error, Exception) else "CANCELLED"


def _tell(act: str, name: str, request: Any, caller: Caller, outcome: str) -> None:
    ids = {each: value for each in _IDS if is_uuid(value := getattr(request, each, "").lower())}
    who = (
        {"caller": "service"}
        if caller.user_id is None
        else {"caller": "user", "caller_user_id": caller.user_id}
    )
    if caller.subject:
        who["subject"] = caller.subject[:_MAX_TEXT]
    audit(act=act, method=name, outcome=outcome, **who, **ids)
