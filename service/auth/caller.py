"""`Caller`: the sender of a call, and the users that it may act for."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import InvalidArgument, PermissionDenied
from service.ids import SYSTEM_USER_ID


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated sender of a call."""

    user_id: str | None = None
    """The calling user, as canonical UUID text; None for a service, which may act for any user."""
    expires_at: float | None = None
    """When its token expires, in seconds on the running loop's clock; None for never."""
    subject: str = ""
    """The name in its token or certificate, as the issuer wrote it; empty without either."""

    @property
    def is_service(self) -> bool:
        """Whether the caller may act for any user."""
        return self.user_id is None

    def resolve_user_id(self, user_id: str) -> str:
        """Return the user that a request acts on, given the request's `user_id`.

        Raises:
            PermissionDenied: a user names another user (USER_MISMATCH).
            InvalidArgument: a service names no user, or the system's own.
        """
        requested = user_id.lower()
        if self.user_id is not None:
            if requested not in ("", self.user_id):
                raise PermissionDenied(
                    "a user may act for itself only: leave user_id empty or set your own id",
                    reason="USER_MISMATCH",
                )
            return self.user_id
        if not requested:
            raise InvalidArgument.field("user_id", "is required")
        if requested == SYSTEM_USER_ID:
            raise InvalidArgument.field("user_id", "is the system's own user: name another one")
        return requested

    def document_owner_ids(self, user_id: str) -> tuple[str, ...]:
        """Return the owners whose documents a request may read, in order of precedence.

        The user's own documents precede the shared ones. A service that names no user, or the
        system's own, means the shared ones only.

        Raises:
            PermissionDenied: as `resolve_user_id`.
        """
        if self.is_service and user_id.lower() in ("", SYSTEM_USER_ID):
            return (SYSTEM_USER_ID,)
        return self.resolve_user_id(user_id), SYSTEM_USER_ID

    def require_service(self) -> None:
        """Check that the caller is a service.

        Raises:
            PermissionDenied: the caller is a user (SERVICE_ONLY).
        """
        if self.user_id is not None:
            raise PermissionDenied(
                "only services may do this: the caller's token lacks the scope chathistory.service",
                reason="SERVICE_ONLY",
            )
