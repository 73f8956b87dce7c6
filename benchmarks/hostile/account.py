"""The knowledge of all processes of a run: address, tokens, and ids of the stored data."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import jwt

from service.auth.bearer import SERVICE_SCOPE

AUDIENCE = "hostile"
_TOKEN_LIFETIME_S = 24 * 3600


@dataclass
class Account:
    """One user: its token, and the ids of its stored data."""

    address: str
    user_id: str
    token: str
    service_token: str
    """Token of a service, for the RPCs that users cannot call and for preparations."""
    sessions: dict[str, str] = field(default_factory=dict)
    """Ids of sessions, by the name of their content."""
    message_id: str = ""
    """A message of the session `short`."""
    document_id: str = ""
    long_count: int = 0
    """Number of messages of the session `long`."""

    def metadata(self, *, as_service: bool = False) -> list[tuple[str, str]]:
        """Return the call metadata with a token."""
        token = self.service_token if as_service else self.token
        return [("authorization", f"Bearer {token}")]

    def to_json(self) -> str:
        """Serialise, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def new_token(key: str, subject: str, *, is_service: bool = False) -> str:
    """Return a token for a user, or for a service."""
    claims: dict[str, Any] = {
        "sub": subject,
        "aud": AUDIENCE,
        "exp": int(time.time()) + _TOKEN_LIFETIME_S,
    }
    if is_service:
        claims["scope"] = SERVICE_SCOPE
    return jwt.encode(claims, key, algorithm="HS256")
