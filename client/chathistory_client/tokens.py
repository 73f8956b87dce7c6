"""Bearer tokens: asked for when there is none, before a JWT expires, and once more when one is refused."""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import json
import time
from collections.abc import Awaitable, Callable

TokenSource = str | Callable[[], str | Awaitable[str]]
"""A token, or a function (async or not) that returns a fresh one."""

REFRESH_MARGIN_S = 30.0
"""Seconds before its end at which a JWT is renewed; a short-lived one at four fifths of its life."""


class TokenCache:
    """The token of the moment."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._token = ""
        self._refresh_at = 0.0
        # Made at first use, in the loop that uses it: those who need a token at once ask for it once.
        self._lock: asyncio.Lock | None = None

    async def get(self) -> str:
        """Return a token that is still good, as far as can be seen."""
        if not self._token or time.time() >= self._refresh_at:
            await self._fetch(self._token)
        return self._token

    async def refresh(self, rejected: str) -> bool:
        """Get another token than one that was refused; False when there is no other."""
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
                return  # Somebody else has asked meanwhile.
            result = self._source()
            self._token = await result if inspect.isawaitable(result) else result
            now = time.time()
            remaining_s = _expiry(self._token) - now
            self._refresh_at = now + max(remaining_s - REFRESH_MARGIN_S, remaining_s * 0.8)


def _expiry(token: str) -> float:
    """Return when a JWT ends, by its own word; never for anything else."""
    try:
        _, payload, _ = token.split(".")
        return float(
            json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        return float("inf")
