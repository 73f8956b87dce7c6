"""The calls of each caller that wait until their requests are received."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

from grpc import aio

from service.auth.caller import Caller

MAX_QUEUED_PER_USER = 16
"""Calls of a user that may wait before the user's requests are received one by one. Such a flood
must wait here, where users take turns, and not in gRPC, where its calls precede those of others."""

Context = aio.ServicerContext[Any, Any]


class Receipt:
    """A request that is being received, or waits for it."""

    __slots__ = ("_caller", "_key", "_permit", "context", "is_received", "started_at")

    def __init__(self, context: Context, caller: Caller, started_at: float) -> None:
        self.context = context
        self.started_at = started_at
        self.is_received = False
        self._permit: asyncio.Future[None] | None = None
        self._caller = caller
        self._key = ""

    @property
    def user_id(self) -> str | None:
        """The user who calls; None for a service."""
        return self._caller.user_id

    @property
    def permit(self) -> asyncio.Future[None]:
        """Done once the call may receive its request."""
        if self._permit is None:
            self._permit = asyncio.get_running_loop().create_future()
        return self._permit

    @property
    def key(self) -> str:
        """The caller: a user, or the connection of a service."""
        if not self._key:
            self._key = self._caller.user_id or self.context.peer()
        return self._key


class CallerQueue(OrderedDict[Receipt, None]):
    """The waiting calls of a caller, in order. Thousands may be cancelled together, in any order.

    It is never empty.
    """

    @property
    def user_id(self) -> str | None:
        """The user who calls; None for a service."""
        return next(iter(self)).user_id

    @property
    def is_flood(self) -> bool:
        """Whether a user has too many calls that wait."""
        return len(self) > MAX_QUEUED_PER_USER and self.user_id is not None


class CallerQueues(OrderedDict[str, CallerQueue]):
    """The waiting calls of each caller; the caller in front is next."""

    def add(self, receipt: Receipt) -> CallerQueue:
        """Add a call, and return the queue of its caller."""
        queue = self.setdefault(receipt.key, CallerQueue())
        queue[receipt] = None
        return queue

    def remove(self, receipt: Receipt) -> None:
        """Remove a call, if it still waits."""
        if queue := self.get(receipt.key):
            queue.pop(receipt, None)
            if not queue:
                del self[receipt.key]

    def take(self, key: str) -> Receipt | None:
        """Take the first call of a caller that still waits; the caller becomes the last."""
        queue = self.pop(key)
        receipt: Receipt | None = None
        while queue and receipt is None:
            receipt, _ = queue.popitem(last=False)
            if receipt.permit.done():  # Its call was cancelled.
                receipt = None
        if queue:
            self[key] = queue
        return receipt
