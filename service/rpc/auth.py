"""Who calls: from a call's metadata to a Caller, and from a Caller to the user it may act for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from grpc import aio

from service.errors import InvalidArgument, PermissionDenied
from service.store.tables import SYSTEM_USER_ID


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from."""

    user_id: str | None = None
    """The user who calls, as canonical UUID text; None for a service, which may act for anybody."""
    expires_at: float | None = None
    """When what it has shown of itself ends, on the running loop's clock; None for never."""

    @property
    def is_service(self) -> bool:
        """Whether the caller may act for anybody."""
        return self.user_id is None

    def owner(self, user_id: str) -> str:
        """Return whose things a request is about, given its `user_id`.

        Raises:
            PermissionDenied: a user asks for another's (USER_MISMATCH).
            InvalidArgument: a service names nobody, or the system's own user.
        """
        wanted = user_id.lower()
        if self.user_id is not None:
            if wanted not in ("", self.user_id):
                raise PermissionDenied("not yours", reason="USER_MISMATCH")
            return self.user_id
        if not wanted:
            raise InvalidArgument.field("user_id", "is required")
        if wanted == SYSTEM_USER_ID:
            raise InvalidArgument.field("user_id", "is the system's own")
        return wanted

    def require_service(self) -> None:
        """Let only a service pass.

        Raises:
            PermissionDenied: the caller is a user (SERVICE_ONLY).
        """
        if self.user_id is not None:
            raise PermissionDenied("only a service may do this", reason="SERVICE_ONLY")


Authenticate = Callable[["aio.ServicerContext[Any, Any]"], Awaitable[Caller]]
"""Turns a call's metadata into its Caller, or raises Unauthenticated."""

_SERVICE = Caller()


async def trust(_context: aio.ServicerContext[Any, Any]) -> Caller:
    """Take every caller for a service: `CHAT_HISTORY_AUTH=none`, on a loopback address."""
    return _SERVICE
