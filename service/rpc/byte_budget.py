"""Bounds the bytes of requests and replies that calls hold, next to the limit in calls."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from typing import NoReturn

from service import errors
from service.rpc.backoff import RejectionBackoff


class ByteBudget:
    """Bytes that calls hold: in total, for each user and for each connection.

    As with calls, a quarter of the total is kept for users who hold little: beyond three quarters,
    the number of bytes up to which a user is still admitted decreases with the room that is left.
    """

    def __init__(self, limit: int, per_user: int, per_connection: int) -> None:
        """Set the limits, in bytes."""
        self.limit = limit
        self.per_user = per_user
        self.per_connection = per_connection
        self.unchecked_bytes = min(per_user, per_connection) * 7 // 8
        """While no more is held, `check_room` passes for every user and connection."""
        self.held = 0
        self.rejections: Counter[str] = Counter()
        """Charges that were rejected, by limit: total, user, connection."""
        self._users: dict[str, int] = {}
        self._connections: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        """The waiting reservations of each user; the user in front is next."""
        self._backoff = RejectionBackoff()

    @property
    def waiting_count(self) -> int:
        """Number of reservations that wait for room."""
        return sum(map(len, self._queues.values()))

    def charge(self, owner_id: str, connection: str, n_bytes: int) -> None:
        """Count bytes as held; `release` must follow.

        Args:
            owner_id: The user who holds them.
            connection: Name of the connection; empty for one without a limit of its own.
            n_bytes: Number of bytes.

        Raises:
            Overloaded: they exceed a limit.
        """
        exceeded = self._exceeded_limit(owner_id, connection, n_bytes)
        if exceeded:
            self._reject(exceeded)
        self.add(owner_id, connection, n_bytes)

    def check_room(self, owner_id: str, connection: str) -> None:
        """Check that a user and a connection are not close to their limits.

        Their calls are rejected before any work is done, which the limits would probably waste.

        Raises:
            Overloaded: they hold nearly all that they may.
        """
        if self._users.get(owner_id, 0) > self.per_user - self.per_user // 8:
            exceeded = "user"
        elif self._connections.get(connection, 0) > self.per_connection - self.per_connection // 8:
            exceeded = "connection"
        else:
            return
        self._reject(exceeded)

    def _reject(self, exceeded: str) -> NoReturn:
        self.rejections[exceeded] += 1
        raise errors.Overloaded(_MESSAGES[exceeded], retry_after=self._backoff.next_delay_s())

    def add(self, owner_id: str, connection: str, n_bytes: int) -> None:
        """Count bytes as held, even beyond the limits."""
        self.held += n_bytes
        self._users[owner_id] = self._users.get(owner_id, 0) + n_bytes
        if connection:
            self._connections[connection] = self._connections.get(connection, 0) + n_bytes

    def release(self, owner_id: str, connection: str, n_bytes: int) -> None:
        """Count bytes as no longer held."""
        self.held -= n_bytes
        _subtract(self._users, owner_id, n_bytes)
        if connection:
            _subtract(self._connections, connection, n_bytes)
        if self._queues:
            self._grant()

    async def reserve(self, owner_id: str, connection: str, n_bytes: int) -> None:
        """Count bytes as held as soon as there is room; `release` must follow.

        Reservations use at most half of each limit, so that streams, which may be read slowly or
        not at all, leave room for the calls. They are granted to users in rotation.
        """
        if not self._queues and self._has_room_to_reserve(owner_id, connection, n_bytes):
            self.add(owner_id, connection, n_bytes)
            return
        waiter = _Waiter(connection, n_bytes)
        self._queues.setdefault(owner_id, deque()).append(waiter)
        try:
            # A user who waits must not keep out another one who has room.
            self._grant()
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self.release(owner_id, connection, n_bytes)
            else:
                self._forget(owner_id, waiter)
            raise

    def _exceeded_limit(self, owner_id: str, connection: str, n_bytes: int) -> str:
        """Return the name of the limit that more bytes would exceed, or an empty string."""
        of_user = self._users.get(owner_id, 0) + n_bytes
        if of_user > self.per_user:
            return "user"
        if connection and self._connections.get(connection, 0) + n_bytes > self.per_connection:
            return "connection"
        room = self.limit - self.held
        if n_bytes > room - self.limit // 4 and of_user > room:
            return "total"
        return ""

    def _has_room_to_reserve(self, owner_id: str, connection: str, n_bytes: int) -> bool:
        return (
            self.held + n_bytes <= self.limit // 2
            and self._users.get(owner_id, 0) + n_bytes <= self.per_user // 2
            and self._connections.get(connection, 0) + n_bytes <= self.per_connection // 2
        )

    def _grant(self) -> None:
        """Grant the waiting reservations for which there is room."""
        for owner_id in list(self._queues):
            queue = self._queues[owner_id]
            while queue and queue[0].granted.done():
                queue.popleft()  # It was cancelled, and has not yet run to forget itself.
            if not queue:
                del self._queues[owner_id]
                continue
            waiter = queue[0]
            if not self._has_room_to_reserve(owner_id, waiter.connection, waiter.n_bytes):
                continue
            self.add(owner_id, waiter.connection, waiter.n_bytes)
            queue.popleft()
            waiter.granted.set_result(None)
            if queue:
                self._queues.move_to_end(owner_id)
            else:
                del self._queues[owner_id]

    def _forget(self, owner_id: str, waiter: _Waiter) -> None:
        queue = self._queues.get(owner_id)
        if queue is None or waiter not in queue:
            return  # `_grant` has dropped it.
        queue.remove(waiter)
        if not queue:
            del self._queues[owner_id]
        if self._queues:
            self._grant()


class _Waiter:
    """A reservation that waits for room."""

    __slots__ = ("connection", "granted", "n_bytes")

    def __init__(self, connection: str, n_bytes: int) -> None:
        self.connection = connection
        self.n_bytes = n_bytes
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _subtract(counts: dict[str, int], key: str, n_bytes: int) -> None:
    left = counts[key] - n_bytes
    if left:
        counts[key] = left
    else:
        del counts[key]


_MESSAGES = {
    "user": "this user's calls hold too many bytes of requests and replies; "
    "read the replies, and retry after the given delay",
    "connection": "the calls of this connection hold too many bytes of requests and replies; "
    "read the replies, and retry after the given delay",
    "total": "the calls in flight on this server hold too many bytes; retry after the given delay",
}
