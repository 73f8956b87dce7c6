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

RENEW_BEFORE = 30.0
"""Seconds before its end at which a JWT is renewed; a short-lived one at four fifths of its life."""


class Tokens:
    """The token of the moment."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._token = ""
        self._renew_at = 0.0
        # Made at first use, in the loop that uses it: those who need a token at once ask for it once.
        self._asking: asyncio.Lock | None = None

    async def get(self) -> str:
        """Return a token that is still good, as far as can be seen."""
        if not self._token or time.time() >= self._renew_at:
            await self._ask(self._token)
        return self._token

    async def renew(self, refused: str) -> bool:
        """Get another token than one that was refused; False when there is no other."""
        await self._ask(refused)
        return self._token != refused

    async def _ask(self, old: str) -> None:
        if isinstance(self._source, str):
            self._token, self._renew_at = self._source, float("inf")
            return
        if self._asking is None:
            self._asking = asyncio.Lock()
        async with self._asking:
            if self._token != old:
                return  # Somebody else has asked meanwhile.
            answer = self._source()
            self._token = await answer if inspect.isawaitable(answer) else answer
            now = time.time()
            left = _expiry(self._token) - now
            self._renew_at = now + max(left - RENEW_BEFORE, left * 0.8)


def _expiry(token: str) -> float:
    """Return when a JWT ends, by its own word; never for anything else."""
    try:
        _, payload, _ = token.split(".")
        return float(
            json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        return float("inf")
