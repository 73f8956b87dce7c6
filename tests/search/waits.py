"""Waits for a condition, and for the state of a server's search."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from service.search.service import Search
from service.server import Server

POLL_S = 0.02


async def wait_until(
    condition: Callable[[], Awaitable[bool]], description: str, timeout_s: float = 60.0
) -> None:
    """Wait until a condition is true; fail with its description after a timeout."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        await asyncio.sleep(POLL_S)


async def wait_until_searchable(server: Server) -> None:
    """Wait until search responds."""

    async def is_healthy() -> bool:
        return server.search.is_healthy

    await wait_until(is_healthy, "search is ready")


async def wait_until_built(server: Server) -> None:
    """Wait until no rebuild runs. The first one runs on while search responds already."""
    search = server.search
    assert isinstance(search, Search)

    async def is_built() -> bool:
        return search._rebuild_task is None or search._rebuild_task.done()

    await wait_until(is_built, "the index is built")


async def wait_until_indexed(server: Server) -> None:
    """Wait until no row of the outbox is pending; dead letters do not count."""
    search = server.search
    assert isinstance(search, Search)
    assert search._indexer is not None
    outbox = search._indexer._outbox

    async def is_empty() -> bool:
        return (await outbox.backlog()).pending == 0

    await wait_until(is_empty, "everything is indexed")
