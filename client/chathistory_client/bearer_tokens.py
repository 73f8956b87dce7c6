"""Cached bearer tokens, fetched again before a JWT expires or after a rejection."""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import json
import time
from collections.abc import Awaitable, Callable

TokenSource = str | Callable[[], str | Awaitable[str]]
"""A token, or a function, async or not, that returns a current one."""

REFRESH_MARGIN_S = 30.0
"""Time before its expiry at which a JWT is replaced, or 80% of its lifetime if that is later."""


class TokenCache:
    """Caches the token of one source."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._token = ""
        self._refresh_at = 0.0
        # Created at first use, in the event loop of the calls. Concurrent calls fetch one token.
        self._lock: asyncio.Lock | None = None

    async def get(self) -> str:
        """Return the cached token, or a new one if there is none or it is about to expire."""
        if not self._token or time.time() >= self._refresh_at:
            await self._fetch(self._token)
        return self._token

    async def refresh(self, rejected: str) -> bool:
        """Fetch a token to replace a rejected one.

        Returns:
            False if the source has no other token.
        """
        await self._fetch(rejected)
        return self._token != rejected

    async def _fetch(self, replaced: str) -> None:
        if isinstance(self._source, str):
            self._token, self._refresh_at = self._source, float("inf")
            return
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._token != replaced:
                return  # A concurrent call has fetched it.
            result = self._source()
            self._token = await result if inspect.isawaitable(result) else result
            now = time.time()
            remaining_s = _expiry(self._token) - now
            self._refresh_at = now + max(remaining_s - REFRESH_MARGIN_S, remaining_s * 0.8)


def _expiry(token: str) -> float:
    """Return the expiry of a JWT in seconds since 1970, infinity for any other token."""
    try:
        _, payload, _ = token.split(".")
        return float(
            json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        return float("inf")
