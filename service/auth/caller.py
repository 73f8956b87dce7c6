"""Who calls: from a call's metadata to a Caller, and from a Caller to the user it may act for."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from grpc import aio

from service.auth.bearer import Identity, Verifier, refused
from service.errors import InvalidArgument, NotFound, PermissionDenied
from service.store import users
from service.store.db.database import Database
from service.store.tables import SYSTEM_USER_ID

MAX_KNOWN_TOKENS = 10_000
"""Verified tokens remembered; the one not seen for the longest time goes first."""
USER_SECONDS = 30.0
"""How long it is remembered which user an external id belongs to."""
LOOK_UP_TIMEOUT = 10.0
"""Seconds to find that out, unless the caller's deadline is nearer."""
MAX_LIFETIME = 366 * 24 * 3600.0
"""Seconds; an expiry beyond that is no time that a timer takes."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a call comes from."""

    user_id: str | None = None
    """The user who calls, as canonical UUID text; None for a service, which may act for anybody."""
    expires_at: float | None = None
    """When what it has shown of itself ends, on the running loop's clock; None for never."""
    subject: str = ""
    """Whom its token or certificate names, in the issuer's words; empty without one."""

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


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in canonical form."""
    return _UUID.fullmatch(text) is not None


Authenticate = Callable[["aio.ServicerContext[Any, Any]"], Awaitable[Caller]]
"""Turns a call's metadata into its Caller, or raises Unauthenticated."""

_SERVICE = Caller()


async def trust(_context: aio.ServicerContext[Any, Any]) -> Caller:
    """Take every caller for a service: `CHAT_HISTORY_AUTH=none`, on a loopback address."""
    return _SERVICE


async def by_certificate(context: aio.ServicerContext[Any, Any]) -> Caller:
    """Take every caller for the service that its certificate names: `CHAT_HISTORY_AUTH=none` under mutual TLS."""
    shown = context.auth_context()
    names = shown.get("x509_common_name") or shown.get("x509_subject_alternative_name") or ()
    return Caller(subject=next(iter(names), b"").decode(errors="replace"))


class _Known(NamedTuple):
    """A caller whose token has been verified."""

    caller: Caller
    until: float
    """In seconds since 1970."""
    generation: int


class BearerTokens:
    """Authenticates by the `authorization: Bearer …` of each call; a verified token is not verified again while it is valid."""

    def __init__(
        self,
        verifier: Verifier,
        find_user: Callable[[str, float], Awaitable[str | None]] | None = None,
    ) -> None:
        """Take tokens that a verifier accepts.

        Args:
            verifier: Tells genuine tokens from others.
            find_user: From a token's subject and a deadline to the user's id, None when there is none; by default the subject is it.
        """
        self._verifier = verifier
        self._keys = verifier.keys
        self._find_user = find_user
        # By digest, so that no token stays in memory.
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def __call__(self, context: aio.ServicerContext[Any, Any]) -> Caller:
        """Return who calls.

        Raises:
            Unauthenticated: no token is shown, or none that is valid.
            Unavailable: neither yes nor no can be said now.
        """
        token = _token(context)
        digest = blake2b(token.encode(), digest_size=16).digest()
        self._keys.touch()
        known = self._known.get(digest)
        if (
            known is not None
            and known.until > time.time()
            and known.generation == self._keys.generation
        ):
            self._known.move_to_end(digest)
            return known.caller
        generation = self._keys.generation
        identity = await self._verifier.verify(token)
        caller = await self._caller(identity, context)
        until = (
            identity.expires_at
            if self._find_user is None
            else min(identity.expires_at, time.time() + USER_SECONDS)
        )
        self._known[digest] = _Known(caller, until, generation)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KNOWN_TOKENS:
            self._known.popitem(last=False)
        return caller

    async def _caller(self, identity: Identity, context: aio.ServicerContext[Any, Any]) -> Caller:
        loop = asyncio.get_running_loop()
        expires_at = loop.time() + min(identity.expires_at - time.time(), MAX_LIFETIME)
        if identity.is_service:
            return Caller(None, expires_at, identity.subject)
        if self._find_user is None:
            user_id: str | None = identity.subject.lower()
        else:
            left: float | None = context.time_remaining()
            deadline = loop.time() + (
                LOOK_UP_TIMEOUT if left is None else min(left, LOOK_UP_TIMEOUT)
            )
            user_id = await self._find_user(identity.subject, deadline)
        if user_id is None or user_id == SYSTEM_USER_ID or not is_uuid(user_id):
            raise refused()
        return Caller(user_id, expires_at, identity.subject)

    def close(self) -> None:
        """End what goes on in the background."""
        self._keys.close()


def _token(context: aio.ServicerContext[Any, Any]) -> str:
    """Return the one bearer token of a call.

    Raises:
        Unauthenticated: there is none, or more than one.
    """
    found = None
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            if found is not None:
                raise refused()
            found = value
    if not isinstance(found, str):
        raise refused()
    scheme, _, token = found.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise refused()
    return token.strip()


def by_external_id(database: Database) -> Callable[[str, float], Awaitable[str | None]]:
    """Return how to find the user whom a token names by external id: the user must exist."""

    async def find_user(external_id: str, deadline: float) -> str | None:
        if "\0" in external_id:
            return None
        try:
            user = await database.read(
                lambda connection: users.get_by(connection, external_id=external_id),
                owner_id=f"external:{external_id}",
                deadline=deadline,
            )
            return user.id
        except NotFound:
            return None

    return find_user
