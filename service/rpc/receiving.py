"""Bounds the requests that are being received at the same time.

gRPC keeps a whole request in memory before a method sees it, and admission cannot know a request's
size or, when a service calls, its user. Until a call reads its request, the client may only send
the first bytes of it (`server_options.WINDOW_BYTES`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from typing import Any

from grpc import aio
from grpc._cython.cygrpc import (  # type: ignore[import-not-found]
    EOF,
    ExecuteBatchError,
)

from service import errors
from service.auth.caller import Caller
from service.rpc import status
from service.rpc.admission import Admission
from service.rpc.backoff import MAX_RETRY_AFTER_S

PERMIT_COUNT = 32
"""Requests that are received at the same time. One takes at most twice `MAX_REQUEST_BYTES`."""
RECEIVE_TIMEOUT_S = 30.0
"""Time in which a request must arrive."""
CONTENDED_TIMEOUT_S = 2.0
"""The same while calls of a caller who receives less wait for a permit."""
MAX_WAITING = 1024
"""Calls that wait for a permit. Each may hold `server_options.WINDOW_BYTES`."""
_SWEEP_INTERVAL_S = 1.0

Context = aio.ServicerContext[Any, Any]


class RequestReceiver:
    """Receives the requests of calls, fairly between callers.

    A caller may receive as many requests as there are free permits: one alone uses half of them,
    and there are always some left for others. A user counts as one caller on all connections, and
    a service as one on each connection.
    """

    def __init__(
        self,
        permit_count: int = PERMIT_COUNT,
        timeout_s: float = RECEIVE_TIMEOUT_S,
        contended_timeout_s: float = CONTENDED_TIMEOUT_S,
    ) -> None:
        """Set the limits."""
        self.permit_count = permit_count
        self._timeout_s = timeout_s
        self._contended_timeout_s = contended_timeout_s
        self._uncontended_count = permit_count // 2
        self._receipts: set[_Receipt] = set()
        self._queues: OrderedDict[str, deque[_Receipt]] = OrderedDict()
        """The waiting calls of each caller; the caller in front is next."""
        self._waiting = Admission(MAX_WAITING)
        self._expired_count = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._aborts: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def receiving_count(self) -> int:
        """Number of requests that are being received."""
        return len(self._receipts)

    @property
    def waiting_count(self) -> int:
        """Number of calls that wait for a permit."""
        return self._waiting.in_flight

    @property
    def rejected_count(self) -> int:
        """Calls that were rejected or expired since the start."""
        return self._waiting.rejected_count + self._expired_count

    async def receive(self, context: Context, caller: Caller) -> bytes:
        """Return the request of a call, as bytes.

        Raises:
            InvalidArgument: the client sent none (MALFORMED_REQUEST).
            Overloaded: too many calls wait to be received.
            aio.AbortError: it did not arrive in time, and the call has ended.
        """
        receipt = _Receipt(context, caller, self._loop.time())
        # Up to this number every caller has a permit, so that most calls need no further check.
        if self._queues or len(self._receipts) >= self._uncontended_count:
            await self._wait_for_permit(receipt)
        else:
            self._receipts.add(receipt)
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(_SWEEP_INTERVAL_S, self._sweep)
        try:
            data = await context.read()
            receipt.is_received = True
        finally:
            self._receipts.discard(receipt)
            if self._queues:
                self._grant()
        if data is EOF:
            raise errors.InvalidArgument(
                "the call has no request message", reason="MALFORMED_REQUEST"
            )
        return data  # type: ignore[no-any-return]

    async def _wait_for_permit(self, receipt: _Receipt) -> None:
        key = receipt.key
        self._waiting.enter(key)
        permit = receipt.permit
        self._queues.setdefault(key, deque()).append(receipt)
        try:
            self._grant()
            await permit
        except asyncio.CancelledError:
            self._receipts.discard(receipt)
            if queue := self._queues.get(key):
                with suppress(ValueError):
                    queue.remove(receipt)
                if not queue:
                    del self._queues[key]
            self._grant()
            raise
        finally:
            self._waiting.leave(key)

    def _grant(self) -> None:
        """Grant permits to callers in rotation, while there are some for them."""
        counts = self._counts()
        free_count = self.permit_count - counts.total()
        for key in list(self._queues):
            if counts[key] >= free_count:
                continue
            receipt = self._next_of(key)
            if receipt is not None:
                self._receipts.add(receipt)
                counts[key] += 1
                free_count -= 1
                receipt.started_at = self._loop.time()
                receipt.permit.set_result(None)

    def _next_of(self, key: str) -> _Receipt | None:
        """Take the first call of a caller's queue that still waits; the caller becomes the last."""
        queue = self._queues.pop(key)
        receipt: _Receipt | None = None
        while queue and receipt is None:
            receipt = queue.popleft()
            if receipt.permit.done():  # Its call was cancelled.
                receipt = None
        if queue:
            self._queues[key] = queue
        return receipt

    def _counts(self) -> Counter[str]:
        return Counter(receipt.key for receipt in self._receipts)

    def _sweep(self) -> None:
        """End the calls whose requests do not arrive in time."""
        now = self._loop.time()
        for receipt in list(self._receipts):
            if now - receipt.started_at > self._timeout_s:
                message = f"the request did not arrive within {self._timeout_s:g} s"
                self._expire(receipt, errors.DeadlineExceeded(message))
        self._expire_for_waiting(now)
        if self._queues:
            self._grant()
        self._sweep_timer = (
            self._loop.call_later(_SWEEP_INTERVAL_S, self._sweep) if self._receipts else None
        )

    def _expire_for_waiting(self, now: float) -> None:
        """End a slow call for each caller that waits: of those who receive most, the oldest."""
        counts = self._counts()
        fewest = min((counts[key] for key in self._queues), default=0)
        for _ in range(len(self._queues)):
            slow = [
                receipt
                for receipt in self._receipts
                if now - receipt.started_at > self._contended_timeout_s
                and counts[receipt.key] > fewest
            ]
            if not slow:
                return
            receipt = max(slow, key=lambda receipt: (counts[receipt.key], -receipt.started_at))
            counts[receipt.key] -= 1
            message = "the request arrives slowly while others wait; retry after the given delay"
            self._expire(receipt, errors.Overloaded(message, retry_after=MAX_RETRY_AFTER_S))

    def _expire(self, receipt: _Receipt, error: errors.ServiceError) -> None:
        self._expired_count += 1
        self._receipts.discard(receipt)
        task = self._loop.create_task(_abort(receipt, error))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def close(self) -> None:
        """Stop the timer."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()


class _Receipt:
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


async def _abort(receipt: _Receipt, error: errors.ServiceError) -> None:
    """End a call from outside its task, whose `read` then raises AbortError.

    Cancelling the task would leave the read to gRPC, which would leak the request. A call whose
    request has arrived at the last moment is served: the client must not repeat it.
    """
    if receipt.is_received:
        return
    with suppress(aio.AbortError, ExecuteBatchError):
        await status.abort(receipt.context, error)
