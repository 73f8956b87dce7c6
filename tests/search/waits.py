"""Waits for the state of a server's search."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from service.search.service import Search
from service.server import Server


async def wait_until(
    condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 60.0
) -> None:
    """Wait for something."""
    give_up = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


async def wait_until_searchable(server: Server) -> None:
    """Wait until search answers."""

    async def healthy() -> bool:
        return server.search.is_healthy

    await wait_until(healthy, "search is ready")


async def wait_until_built(server: Server) -> None:
    """Wait until no index is being built: the first one is, also when search answers already."""

    async def done() -> bool:
        assert isinstance(server.search, Search)
        return server.search._rebuild is None or server.search._rebuild.done()

    await wait_until(done, "the index is built")


async def wait_until_indexed(server: Server) -> None:
    """Wait until the index owes nothing that can be done."""
    assert isinstance(server.search, Search)
    outbox = server.search._indexer._outbox if server.search._indexer else None
    assert outbox is not None

    async def nothing() -> bool:
        return (await outbox.backlog()).pending == 0

    await wait_until(nothing, "everything is indexed")
