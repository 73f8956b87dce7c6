"""Authenticators: functions from a call's metadata to its `Caller`."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, NamedTuple

from grpc import aio

from service.auth.bearer import TokenIdentity, TokenVerifier, invalid_token
from service.auth.caller import Caller
from service.ids import SYSTEM_USER_ID, is_uuid

MAX_CACHED_TOKENS = 10_000
"""Verified tokens in the cache; beyond that the least recently used is evicted."""
USER_ID_TTL_S = 30.0
"""Time for which the user of an external id is cached."""
LOOK_UP_TIMEOUT_S = 10.0
"""Timeout of the look-up of that user; the call's own deadline may be earlier."""
MAX_LIFETIME_S = 366 * 24 * 3600.0
"""Cap of a token's remaining lifetime: the event loop's timers do not accept longer times."""

Authenticate = Callable[["aio.ServicerContext[Any, Any]"], Awaitable[Caller]]
"""Returns the caller of a call, or raises Unauthenticated."""

FindUserId = Callable[[str, float], Awaitable[str | None]]
"""Returns the id of the user with an external id, or None; takes the id and a deadline."""

_SERVICE = Caller()


async def trust_all(_context: aio.ServicerContext[Any, Any]) -> Caller:
    """Authenticate every caller as a service: `CHAT_HISTORY_AUTH=none` on a loopback address."""
    return _SERVICE


async def by_certificate(context: aio.ServicerContext[Any, Any]) -> Caller:
    """Authenticate the service that the client certificate names.

    For `CHAT_HISTORY_AUTH=none` with mutual TLS.
    """
    properties = context.auth_context()
    names = (
        properties.get("x509_common_name") or properties.get("x509_subject_alternative_name") or ()
    )
    return Caller(subject=next(iter(names), b"").decode(errors="replace"))


class _CachedCaller(NamedTuple):
    """The caller of a token that has been verified."""

    caller: Caller
    valid_until: float
    """In seconds since 1970."""
    key_generation: int


class BearerAuthenticator:
    """Authenticates each call by its `authorization: Bearer …`; verified tokens are cached."""

    def __init__(self, verifier: TokenVerifier, find_user_id: FindUserId | None = None) -> None:
        """Start with an empty cache.

        Args:
            verifier: Verifies tokens.
            find_user_id: Finds the user by a token's subject. None if the subject is the user's id.
        """
        self._verifier = verifier
        self._keys = verifier.keys
        self._find_user_id = find_user_id
        # By digest, so that no token stays in memory.
        self._cache: OrderedDict[bytes, _CachedCaller] = OrderedDict()

    async def __call__(self, context: aio.ServicerContext[Any, Any]) -> Caller:
        """Return the caller.

        Raises:
            Unauthenticated: the call has no token, or one that is not valid.
            Unavailable: the token's key or its user cannot be looked up now.
        """
        token = _bearer_token(context)
        digest = blake2b(token.encode(), digest_size=16).digest()
        self._keys.refresh_if_old()
        cached = self._cache.get(digest)
        if (
            cached is not None
            and cached.valid_until > time.time()
            and cached.key_generation == self._keys.generation
        ):
            self._cache.move_to_end(digest)
            return cached.caller
        # Read before verifying: a key withdrawn during the verification must invalidate this entry.
        key_generation = self._keys.generation
        identity = await self._verifier.verify(token)
        caller = await self._caller(identity, context)
        valid_until = (
            identity.expires_at
            if self._find_user_id is None
            else min(identity.expires_at, time.time() + USER_ID_TTL_S)
        )
        self._cache[digest] = _CachedCaller(caller, valid_until, key_generation)
        self._cache.move_to_end(digest)
        if len(self._cache) > MAX_CACHED_TOKENS:
            self._cache.popitem(last=False)
        return caller

    async def _caller(
        self, identity: TokenIdentity, context: aio.ServicerContext[Any, Any]
    ) -> Caller:
        loop = asyncio.get_running_loop()
        expires_at = loop.time() + min(identity.expires_at - time.time(), MAX_LIFETIME_S)
        if identity.is_service:
            return Caller(None, expires_at, identity.subject)
        if self._find_user_id is None:
            user_id: str | None = identity.subject.lower()
        else:
            remaining_s: float | None = context.time_remaining()
            timeout_s = (
                LOOK_UP_TIMEOUT_S if remaining_s is None else min(remaining_s, LOOK_UP_TIMEOUT_S)
            )
            user_id = await self._find_user_id(identity.subject, loop.time() + timeout_s)
        if user_id is None or user_id == SYSTEM_USER_ID or not is_uuid(user_id):
            raise invalid_token()
        return Caller(user_id, expires_at, identity.subject)

    def close(self) -> None:
        """Stop fetching keys."""
        self._keys.close()


def _bearer_token(context: aio.ServicerContext[Any, Any]) -> str:
    """Return the bearer token of a call.

    Raises:
        Unauthenticated: the call has no token, or several.
    """
    header = None
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            if header is not None:
                raise invalid_token()
            header = value
    if not isinstance(header, str):
        raise invalid_token()
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise invalid_token()
    return token.strip()
