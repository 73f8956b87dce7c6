"""`Call`: what a method gets with its request: the caller, the deadline and the held bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from service.auth.caller import Caller
from service.rpc.byte_budget import ByteBudget

UNCOUNTED_BYTES = 8 * 1024
"""Requests and replies up to this size are bounded by the limit in calls only."""


class Call:
    """The caller and the deadline of one call, and the bytes that it holds."""

    __slots__ = (
        "_budget",
        "_connection",
        "_context",
        "caller",
        "deadline",
        "held_bytes",
        "owner_id",
    )

    def __init__(
        self, caller: Caller, deadline: float, owner_id: str, budget: ByteBudget, context: Any
    ) -> None:
        """Describe a call.

        Args:
            caller: The authenticated caller.
            deadline: When the reply is due, in seconds on the running loop's clock.
            owner_id: The user whose share of the budget it uses.
            budget: Bounds the bytes of all calls.
            context: The servicer context, which names the connection.
        """
        self.caller = caller
        self.deadline = deadline
        self.owner_id = owner_id
        self.held_bytes = 0
        self._budget = budget
        self._context = context
        self._connection: str | None = None

    @property
    def connection(self) -> str:
        """The name of the connection; empty for a Unix socket, since all of them have one name."""
        if self._connection is None:
            peer = self._context.peer()
            self._connection = "" if peer.startswith("unix:") else peer
        return self._connection

    def metadata(self, key: str) -> str:
        """Return the value of a key of the request's metadata; empty if there is none."""
        pairs = self._context.invocation_metadata() or ()
        return next((str(value) for name, value in pairs if name == key), "")

    def charge(self, n_bytes: int) -> None:
        """Count bytes that the call holds until its end, or until `release`.

        Call it before the bytes are read. When a unary method returns, its charges are replaced by
        the size of its reply, which is held until the client has received it.

        Raises:
            Overloaded: they exceed a limit: of the server, the user or the connection.
        """
        self._budget.charge(self.owner_id, self.connection, n_bytes)
        self.held_bytes += n_bytes

    async def reserve(self, n_bytes: int) -> None:
        """Wait until the budget has room for bytes, and count them as held until `release`.

        For streams. A stream that already holds bytes must release them before it waits for more;
        otherwise streams could wait for each other.
        """
        await self._budget.reserve(self.owner_id, self.connection, n_bytes)
        self.held_bytes += n_bytes

    def release(self, n_bytes: int) -> None:
        """Count bytes as no longer held; 0 changes nothing."""
        if not n_bytes:
            return
        self._budget.release(self.owner_id, self.connection, n_bytes)
        self.held_bytes -= n_bytes

    def hold_reply(self, n_bytes: int, *, is_write: bool) -> None:
        """Replace the held bytes by those of the reply.

        Args:
            n_bytes: Size of the reply.
            is_write: Whether the call has changed data; the reply is then held beyond the limits.

        Raises:
            Overloaded: as `charge`.
        """
        change = n_bytes - self.held_bytes
        if change < 0:
            self.release(-change)
        elif is_write:
            self._budget.add(self.owner_id, self.connection, change)
            self.held_bytes += change
        else:
            self.charge(change)


UnaryMethod = Callable[[Any, Call], Awaitable[Any]]
StreamMethod = Callable[[Any, Call], AsyncGenerator[Any]]
