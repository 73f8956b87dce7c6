"""The audit trail: erasures, exports, acts of a service for a user, and denied calls.

Lines carry ids and outcomes, never content. Every erasure and every export is recorded. An act for
a user is recorded once an hour for each service, user and RPC, and only where callers are
identified by a token or a certificate. A line for every append would cost more than the append's
share of the database, and one line an hour shows which service worked with which user's data.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from service.auth.caller import Caller
from service.errors import PermissionDenied, ServiceError
from service.ids import is_uuid
from service.rpc.call import Call, StreamMethod, UnaryMethod
from service.rpc.method_policies import AuditRule
from service.telemetry.logs import audit

REPEAT_AFTER_S = 3600.0
"""Minimum time between two lines for the same act."""
MAX_REMEMBERED_ACTS = 100_000
"""Beyond this number the oldest acts are forgotten, and may be recorded again earlier."""

_ID_FIELDS = ("user_id", "session_id", "message_id", "document_id")
_MAX_SUBJECT_CHARS = 256


class AuditTrail:
    """Wraps RPCs so that their calls are recorded as their `AuditRule` says."""

    def __init__(self, *, callers_are_identified: bool) -> None:
        """Start an empty trail.

        Args:
            callers_are_identified: Whether callers present a token or a certificate. Without one,
                acts for a user are not recorded, since nothing says which service acted.
        """
        self._callers_are_identified = callers_are_identified
        self._recorded_at: dict[tuple[str, str, str], float] = {}

    def wrap_unary(self, name: str, rule: AuditRule, method: UnaryMethod) -> UnaryMethod:
        """Return a method that records its calls; the given method if none are recorded."""
        if rule is not AuditRule.ACT:
            return self._wrap_unary_always(name, rule, method)
        return self._wrap_unary_hourly(name, method) if self._callers_are_identified else method

    def wrap_stream(self, name: str, rule: AuditRule, method: StreamMethod) -> StreamMethod:
        """Return a method that records its calls; the given method if none are recorded."""
        if rule is not AuditRule.ACT:
            return self._wrap_stream_always(name, rule, method)
        return self._wrap_stream_hourly(name, method) if self._callers_are_identified else method

    def record_denial(
        self, name: str, request: Any, caller: Caller, error: PermissionDenied
    ) -> None:
        """Record that a caller was denied an RPC, once an hour for each caller and RPC."""
        if self._is_due(caller.subject, name, "denied"):
            _record("denied", name, request, caller, error.reason)

    def _wrap_unary_always(self, name: str, rule: AuditRule, method: UnaryMethod) -> UnaryMethod:
        async def audited(request: Any, call: Call) -> Any:
            with _outcome_recorded(rule, name, request, call):
                return await method(request, call)

        return audited

    def _wrap_stream_always(self, name: str, rule: AuditRule, method: StreamMethod) -> StreamMethod:
        async def audited(request: Any, call: Call) -> AsyncGenerator[Any]:
            with _outcome_recorded(rule, name, request, call):
                async with aclosing(method(request, call)) as replies:
                    async for reply in replies:
                        yield reply

        return audited

    def _wrap_unary_hourly(self, name: str, method: UnaryMethod) -> UnaryMethod:
        async def audited(request: Any, call: Call) -> Any:
            if call.caller.user_id is None:
                self._record_act(name, request, call.caller)
            try:
                return await method(request, call)
            except PermissionDenied as error:
                self.record_denial(name, request, call.caller, error)
                raise

        return audited

    def _wrap_stream_hourly(self, name: str, method: StreamMethod) -> StreamMethod:
        async def audited(request: Any, call: Call) -> AsyncGenerator[Any]:
            if call.caller.user_id is None:
                self._record_act(name, request, call.caller)
            try:
                async with aclosing(method(request, call)) as replies:
                    async for reply in replies:
                        yield reply
            except PermissionDenied as error:
                self.record_denial(name, request, call.caller, error)
                raise

        return audited

    def _record_act(self, name: str, request: Any, caller: Caller) -> None:
        if self._is_due(caller.subject, name, getattr(request, "user_id", "")):
            _record(AuditRule.ACT.value, name, request, caller, "allowed")

    def _is_due(self, subject: str, name: str, user_id: str) -> bool:
        """Return whether an act is to be recorded, and remember it if so."""
        now = time.monotonic()
        key = (subject[:_MAX_SUBJECT_CHARS], name, user_id)
        recorded_at = self._recorded_at.get(key)
        if recorded_at is not None and now - recorded_at < REPEAT_AFTER_S:
            return False
        # Inserted again, since the dict's order is the order of age.
        self._recorded_at.pop(key, None)
        self._recorded_at[key] = now
        if len(self._recorded_at) > MAX_REMEMBERED_ACTS:
            del self._recorded_at[next(iter(self._recorded_at))]
        return True


@contextmanager
def _outcome_recorded(rule: AuditRule, name: str, request: Any, call: Call) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _record(rule.value, name, request, call.caller, _outcome(error))
        raise
    _record(rule.value, name, request, call.caller, "OK")


def _outcome(error: BaseException) -> str:
    if isinstance(error, ServiceError):
        return error.reason
    return "INTERNAL" if isinstance(error, Exception) else "CANCELLED"


def _record(act: str, name: str, request: Any, caller: Caller, outcome: str) -> None:
    ids = {
        field: value
        for field in _ID_FIELDS
        if is_uuid(value := getattr(request, field, "").lower())
    }
    fields = (
        {"caller": "service"}
        if caller.user_id is None
        else {"caller": "user", "caller_user_id": caller.user_id}
    )
    if caller.subject:
        fields["subject"] = caller.subject[:_MAX_SUBJECT_CHARS]
    audit(act=act, method=name, outcome=outcome, **fields, **ids)
