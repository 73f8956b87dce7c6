"""When and how fast a watch that broke goes on."""

from __future__ import annotations

import asyncio
import random

import grpc

from chathistory_client.errors import ChatHistoryError

INITIAL_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
RESUMABLE = ChatHistoryError
"""What is looked at."""

_LOST = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})


def can_resume(error: ChatHistoryError) -> bool:
    """Whether a stream that ended so can be opened again: the service is away, draining or full, or a proxy has cut it."""
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return True
    # The service gives a reason with each of its own errors; gRPC and proxies, which also use these codes, do not.
    return error.code in _LOST and not error.reason


class ResumeBackoff:
    """Pauses that grow, with jitter, until there is progress."""

    def __init__(self) -> None:
        self._failures = 0

    @property
    def first(self) -> bool:
        """Whether nothing has failed since the last progress."""
        return self._failures == 0

    def progress(self) -> None:
        """Note that something has come."""
        self._failures = 0

    async def pause(self, at_least: float | None = None) -> None:
        """Wait before the next attempt."""
        ceiling = min(MAX_PAUSE_S, INITIAL_PAUSE_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        await asyncio.sleep((at_least or 0.0) + random.uniform(ceiling / 2, ceiling))  # noqa: S311 - no secret
