"""Resumption of broken watches: the errors after which to resume, and the back-off."""

from __future__ import annotations

import asyncio
import random

import grpc

from chathistory_client.errors import ChatHistoryError

INITIAL_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
_CONNECTION_LOST = frozenset(
    {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}
)


def can_resume(error: ChatHistoryError) -> bool:
    """Whether a stream that ended with this error can be opened again.

    It can while the service is unavailable, draining or overloaded, and when a proxy closed the
    connection.
    """
    if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return True
    # The service's own errors have a reason. Those of gRPC and of proxies have none.
    return error.code in _CONNECTION_LOST and not error.reason


class ResumeBackoff:
    """Exponential back-off with jitter, reset by every message."""

    def __init__(self) -> None:
        self._failure_count = 0

    @property
    def is_reset(self) -> bool:
        """Whether the stream has not failed since its last message."""
        return self._failure_count == 0

    def reset(self) -> None:
        """Start again at the first pause, because the stream delivered a message."""
        self._failure_count = 0

    async def pause(self, retry_after: float | None = None) -> None:
        """Wait before the next attempt.

        Args:
            retry_after: Minimum wait in seconds, as requested by the service.
        """
        ceiling_s = min(MAX_PAUSE_S, INITIAL_PAUSE_S * 2**self._failure_count)
        self._failure_count = min(self._failure_count + 1, 10)
        jitter_s = random.uniform(ceiling_s / 2, ceiling_s)  # noqa: S311 - no secret
        await asyncio.sleep((retry_after or 0.0) + jitter_s)
