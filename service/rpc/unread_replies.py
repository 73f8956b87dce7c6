"""Closes the connections of clients that do not read their replies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection

import structlog

from service.rpc.byte_budget import ByteBudget
from service.rpc.call import Call

READ_TIMEOUT_S = 30.0
"""Time in which a client must have received a reply once it is ready."""

_log = structlog.get_logger(__name__)


class UnreadReplies:
    """The replies that wait for their clients.

    gRPC cannot end a call whose reply it has taken over, so the connection is closed. A stream may
    be read slowly, and is ended only while other streams wait for the bytes that it holds.
    """

    def __init__(
        self,
        budget: ByteBudget,
        close_connections: Callable[[Collection[str]], None],
        timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """Take the parts.

        Args:
            budget: Knows whether streams wait.
            close_connections: Closes connections, given gRPC's names of them; called in a thread.
            timeout_s: Limit for one reply.
        """
        self.timeout_s = timeout_s
        self._budget = budget
        self._close_connections = close_connections
        self._closing: asyncio.Future[None] | None = None
        # In the order of the times, since every reply is added when its time begins.
        self._replies: dict[Call, float] = {}
        self._stream_replies: dict[Call, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def add(self, call: Call) -> None:
        """Record that the reply of a unary call is ready; `remove` must follow."""
        self._replies[call] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self.timeout_s / 4, self._sweep)

    def add_of_stream(self, call: Call) -> None:
        """Record that a reply of a stream is ready; `remove_of_stream` must follow."""
        self._stream_replies[call] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self.timeout_s / 4, self._sweep)

    def remove(self, call: Call) -> None:
        """Record that a unary call has ended, whether or not it had a reply."""
        self._replies.pop(call, None)

    def remove_of_stream(self, call: Call) -> None:
        """Record that the reply of a stream was received, or that the stream has ended."""
        self._stream_replies.pop(call, None)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        overdue = self._overdue(self._replies)
        if self._budget.waiting_count:
            overdue += self._overdue(self._stream_replies)
        # Calls over a Unix socket name no connection.
        counts = Counter(call.connection for call in overdue if call.connection)
        if counts and (self._closing is None or self._closing.done()):
            for connection, count in counts.items():
                _log.warning(
                    "connection closed because its client does not read replies",
                    peer=connection,
                    replies=count,
                    timeout_s=self.timeout_s,
                )
            # In a thread, and together: it looks at every descriptor of the process.
            self._closing = self._loop.run_in_executor(None, self._close_connections, list(counts))
        has_replies = self._replies or self._stream_replies
        self._timer = (
            self._loop.call_later(self.timeout_s / 4, self._sweep) if has_replies else None
        )

    def _overdue(self, replies: dict[Call, float]) -> list[Call]:
        ready_before = self._loop.time() - self.timeout_s
        overdue = []
        for call, ready_at in replies.items():
            if ready_at > ready_before:
                break
            overdue.append(call)
        return overdue
