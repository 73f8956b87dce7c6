"""Reads that may lag: a stub that sends them, and the wait until a replica serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, cast

from service.server import Server
from tests.support.chat import Chat
from tests.support.servers import AsyncStub

T = TypeVar("T")

EVENTUAL = (("read_consistency", "eventual"),)
ENOUGH = 60.0
"""Seconds after which something that has not happened is not expected any more."""


class _EventualStub:
    """A stub whose calls accept data that lags."""

    def __init__(self, stub: AsyncStub) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._stub, name), metadata=EVENTUAL)


def eventual(chat: Chat) -> Chat:
    """Return the same user, whose reads may lag."""
    return Chat(cast("AsyncStub", _EventualStub(chat.stub)), chat.user_id)


def outcomes(server: Server) -> dict[str, int]:
    """Return the reads that may lag, by outcome."""
    assert server.lagging is not None
    return dict(server.lagging.counts)


async def read_from_replica(server: Server, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the replica has served it, and return its result.

    The first calls raise the counter of the epoch, which the replica must receive.
    """
    async with asyncio.timeout(ENOUGH):
        while True:
            before = outcomes(server)
            result = await call()
            after = outcomes(server)
            if after["replica"] > before["replica"] and _fallbacks(after) == _fallbacks(before):
                return result
            await asyncio.sleep(0.05)


def _fallbacks(counts: dict[str, int]) -> int:
    return sum(counts.values()) - counts["replica"]
