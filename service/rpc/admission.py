"""Admission control: bounds the calls and streams in flight, and rejects the others quickly."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from service import errors
from service.rpc.backoff import MAX_RETRY_AFTER_S, RejectionBackoff


class Admission:
    """Bounds the calls in flight, fairly between users.

    One user alone may fill the limit. A quarter more is reserved for users with few calls in
    flight, so that a burst of one user does not keep the others out. As the reserve fills, the
    number of calls in flight with which a user is still admitted decreases.

    Health checks do not pass through admission, so they are answered under overload too.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hard_limit = limit + max(1, limit // 4)
        self.in_flight = 0
        self.last_finished_at = -math.inf
        """When a call last ended, on the monotonic clock."""
        self.is_draining = False
        self.rejected_count = 0
        """Calls rejected as Overloaded since the start."""
        self._counts: dict[str, int] = {}
        self._backoff = RejectionBackoff()

    def enter(self, owner_id: str) -> None:
        """Admit a user's call; `leave` must follow.

        Raises:
            Unavailable: the server is shutting down (DRAINING).
            Overloaded: too many calls are in flight.
        """
        if self.is_draining:
            raise draining_error()
        count = self._counts.get(owner_id, 0)
        if self.in_flight >= self.limit and count >= self.hard_limit - self.in_flight:
            self.rejected_count += 1
            raise errors.Overloaded(
                "too many calls are in flight on this server; retry after the given delay",
                retry_after=self._backoff.next_delay_s(),
            )
        self._counts[owner_id] = count + 1
        self.in_flight += 1

    def leave(self, owner_id: str) -> None:
        """Record that an admitted call of a user has ended."""
        self.in_flight -= 1
        self.last_finished_at = time.monotonic()
        count = self._counts[owner_id]
        if count > 1:
            self._counts[owner_id] = count - 1
        else:
            del self._counts[owner_id]


class StreamAdmission(Admission):
    """Admission for long-lived streams, which are also capped for each connection.

    Without that cap, streams could use up the connection's concurrent HTTP/2 streams, and unary
    calls on it would wait without an error.
    """

    def __init__(self, limit: int, per_connection: int) -> None:
        super().__init__(limit)
        self._per_connection = per_connection
        self._connections: Counter[str] = Counter()

    @contextmanager
    def admitted(self, owner_id: str, connection: str) -> Generator[None]:
        """Admit a user's stream for the duration of a block.

        Args:
            owner_id: The user.
            connection: Name of the connection; empty for one that is not capped.

        Raises:
            Unavailable: as `enter`.
            Overloaded: as `enter`, or too many streams are open on this connection.
        """
        if connection and self._connections[connection] >= self._per_connection:
            self.rejected_count += 1
            raise errors.Overloaded(
                f"this connection has {self._per_connection} open streams, which is its limit; "
                "open another connection",
                retry_after=MAX_RETRY_AFTER_S,
            )
        self.enter(owner_id)
        self._connections[connection] += 1
        try:
            yield
        finally:
            self.leave(owner_id)
            self._connections[connection] -= 1
            if not self._connections[connection]:
                del self._connections[connection]


def draining_error() -> errors.Unavailable:
    """Return the error that makes a client retry, on another replica if there is one."""
    return errors.Unavailable(
        "this server is shutting down; retry", reason="DRAINING", retry_after=0.1
    )
