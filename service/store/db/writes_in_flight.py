"""Writes that run to their end although their callers are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

ABORT_TIMEOUT_S = 1.0
"""Seconds in which cancelled writes may end."""


class WritesInFlight:
    """The writes of one database."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    async def run(
        self, work: Coroutine[Any, Any, T], has_begun: Callable[[], bool] = lambda: True
    ) -> T:
        """Run `work` to its end even when the caller is cancelled; `drain` waits for it.

        Args:
            work: The work.
            has_begun: Whether the work may have changed anything; if not, it is cancelled with its
                caller, so that abandoned calls do not queue for connections.
        """
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not has_begun():
                task.cancel()
            raise

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Marks the exception as retrieved: the caller may have been cancelled.
            task.exception()

    async def drain(self) -> None:
        """Wait for the writes in flight, including those of cancelled callers."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, timeout_s: float | None, abort: Callable[[], None]) -> None:
        """Wait up to `timeout_s` seconds for the writes, and cancel the rest.

        Args:
            timeout_s: None for no limit.
            abort: Called before writes are cancelled. It must close their connections, since the
                cancellation of a statement waits for its connection.
        """
        if not self._tasks:
            return
        _, unfinished = await asyncio.wait(self._tasks, timeout=timeout_s)
        if unfinished:
            abort()
            for task in unfinished:
                task.cancel()
            await asyncio.wait(unfinished, timeout=ABORT_TIMEOUT_S)
