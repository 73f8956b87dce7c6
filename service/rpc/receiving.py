"""Bounds the requests that are being received at the same time.

gRPC keeps a whole request in memory before a method sees it, and admission cannot know a request's
size or, when a service calls, its user. Until a call reads its request, the client may only send
the first bytes of it (`server_options.WINDOW_BYTES`).

Callers wait in queues of their own (`caller_queues`), and a user's large requests are also paced
(`user_paces`).
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import suppress

from grpc import aio
from grpc._cython.cygrpc import (  # type: ignore[import-not-found]
    EOF,
    ExecuteBatchError,
)

from service import errors
from service.auth.caller import Caller
from service.rpc import status
from service.rpc.accepting import UntakenCalls
from service.rpc.admission import Admission
from service.rpc.backoff import MAX_RETRY_AFTER_S
from service.rpc.caller_queues import CallerQueue, CallerQueues, Context, Receipt
from service.rpc.user_paces import FAILED_BYTES, PACED_BYTES, UserPaces

PERMIT_COUNT = 32
"""Requests that are received at the same time. One takes at most twice `MAX_REQUEST_BYTES`."""
RECEIVE_TIMEOUT_S = 30.0
"""Time in which a request must arrive."""
CONTENDED_TIMEOUT_S = 2.0
"""The same while a permit is all that a caller with fewer requests waits for."""
USER_PERMITS = 4
"""Requests of one user that are received at the same time. A service may have more."""
MAX_CALLS_PER_USER = 16
"""Calls of one user in flight, except streams. The replies to more of them, which may be sent
together, would bring as many new calls at the same time."""
MAX_UNTAKEN = 8
"""Calls that wait to be taken up, above which a flood waits: others' calls may be among them."""
BACKLOG_PAUSE_S = 0.02
"""Seconds between two calls of all floods during that time. To take a call up takes a quarter of
the time that it takes to reject it."""
_BACKLOG_INTERVAL_S = 0.002
MAX_WAITING = 1024
"""Calls that wait to be received. Each may hold `server_options.WINDOW_BYTES`, and when connections
close, their calls end together: others wait for about 40 microseconds for each."""
_TIMER_RESOLUTION_S = 0.001
_SOON = 0.0
"""A time that is over: in the next turn of the event loop."""
_SWEEP_INTERVAL_S = 1.0


class RequestReceiver:
    """Receives the requests of calls, fairly between callers.

    A caller may receive as many requests as there are free permits: one alone uses half of them,
    and there are always some left for others. A user counts as one caller on all connections, and
    a service as one on each connection. A user has USER_PERMITS at most, and one after a large
    request.
    """

    def __init__(
        self,
        permit_count: int = PERMIT_COUNT,
        timeout_s: float = RECEIVE_TIMEOUT_S,
        contended_timeout_s: float = CONTENDED_TIMEOUT_S,
        untaken: UntakenCalls | None = None,
    ) -> None:
        """Set the limits.

        Args:
            permit_count: Requests that are received at the same time.
            timeout_s: Time in which a request must arrive.
            contended_timeout_s: The same while a permit is all that another caller waits for.
            untaken: The calls that wait to be taken up, which precede those of a flood.
        """
        self.permit_count = permit_count
        self._timeout_s = timeout_s
        self._contended_timeout_s = contended_timeout_s
        self._uncontended_count = permit_count // 2
        self._unchecked_count = min(USER_PERMITS, self._uncontended_count)
        self._in_flight: dict[str, int] = {}
        """Calls of each user whose requests were received, except streams."""
        self._untaken = untaken or UntakenCalls()
        self._next_of_flood_at = 0.0
        self._receipts: set[Receipt] = set()
        self._queues = CallerQueues()
        self._paces = UserPaces()
        self._grant_timer: asyncio.TimerHandle | None = None
        self._grants_at = math.inf
        self._is_closed = False
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
        """Number of calls that wait to be received."""
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
        receipt = Receipt(context, caller, self._loop.time())
        # Up to this number every caller has a permit, so that most calls need no further check.
        is_checked = (
            len(self._receipts) >= self._unchecked_count
            or self._paces
            or self._queues
            or caller.user_id in self._in_flight
        )
        if is_checked and self._must_wait(receipt):
            await self._wait_for_permit(receipt)
        else:
            self._receipts.add(receipt)
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(_SWEEP_INTERVAL_S, self._sweep)
        # A call that was over before it was received has cost nothing.
        is_over = is_checked and context.time_remaining() == 0
        n_bytes = 0 if is_over else FAILED_BYTES
        try:
            data = await context.read()
            receipt.is_received = True
            if data is not EOF:
                n_bytes = len(data)
        finally:
            self._receipts.discard(receipt)
            if n_bytes > PACED_BYTES and caller.user_id is not None:
                self._paces.count(caller.user_id, n_bytes, self._loop.time())
            if self._queues and (
                len(self._receipts) >= self._uncontended_count - 1 or receipt.key in self._queues
            ):
                self._grant()
        if data is EOF:
            raise errors.InvalidArgument(
                "the call has no request message", reason="MALFORMED_REQUEST"
            )
        return data  # type: ignore[no-any-return]

    def _must_wait(self, receipt: Receipt) -> bool:
        # With fewer receipts, no call waits for a permit: only the caller's own calls matter.
        if len(self._receipts) >= self._uncontended_count:
            return True
        if self._queues and receipt.key in self._queues:
            return True
        user_id = receipt.user_id
        return user_id is not None and (
            user_id in self._paces
            or self._in_flight.get(user_id, 0) >= MAX_CALLS_PER_USER
            or self._counts()[user_id] >= USER_PERMITS
        )

    def call_started(self, caller: Caller) -> None:
        """Count a call that is in flight now; `call_ended` must follow."""
        user_id = caller.user_id
        if user_id is not None:
            self._in_flight[user_id] = self._in_flight.get(user_id, 0) + 1

    def call_ended(self, caller: Caller) -> None:
        """Count a call as ended, and let a call of its user start that waited for that."""
        user_id = caller.user_id
        if user_id is None:
            return
        count = self._in_flight[user_id] - 1
        if count:
            self._in_flight[user_id] = count
        else:
            del self._in_flight[user_id]
        if user_id in self._queues:
            self._grant()

    async def _wait_for_permit(self, receipt: Receipt) -> None:
        key = receipt.key
        self._waiting.enter(key)
        permit = receipt.permit
        queue = self._queues.add(receipt)
        try:
            if len(queue) == 1:  # Otherwise the call before it waits for a time or an event.
                self._grant()
            await permit
        except asyncio.CancelledError:
            self._receipts.discard(receipt)
            self._queues.remove(receipt)
            self._schedule_grant(_SOON)
            raise
        finally:
            self._waiting.leave(key)

    def _grant(self) -> None:
        """Grant permits to callers in rotation, while there are some for them."""
        counts = self._counts()
        free_count = self.permit_count - counts.total()
        now = self._loop.time()
        resumes_at = math.inf
        for key, queue in list(self._queues.items()):
            if counts[key] >= free_count:
                continue
            starts_at = self._starts_at(queue, counts[key], now)
            if starts_at > now:
                resumes_at = min(resumes_at, starts_at)
                continue
            is_flood = queue.is_flood
            receipt = self._queues.take(key)
            if receipt is not None:
                if is_flood:
                    self._next_of_flood_at = now + BACKLOG_PAUSE_S
                self._receipts.add(receipt)
                counts[key] += 1
                free_count -= 1
                receipt.started_at = now
                receipt.permit.set_result(None)
        self._schedule_grant(resumes_at)

    def _schedule_grant(self, at: float) -> None:
        """Set the time of the next `_grant`; infinity: an event causes it.

        The calls that are cancelled together, thousands with one connection, cause only one.
        """
        if at == self._grants_at or self._is_closed:
            return
        self._grants_at = at
        if self._grant_timer is not None:
            self._grant_timer.cancel()
            self._grant_timer = None
        if at < math.inf:
            # The clock of the loop and its timers have a resolution of a millisecond.
            self._grant_timer = self._loop.call_at(at + _TIMER_RESOLUTION_S, self._grant_scheduled)

    def _grant_scheduled(self) -> None:
        self._grant_timer = None
        self._grants_at = math.inf
        self._grant()

    def _starts_at(self, queue: CallerQueue, count: int, now: float) -> float:
        """Return when a caller's next call may start.

        Args:
            queue: The caller's waiting calls.
            count: The caller's requests that are being received.
            now: The time.

        Returns:
            The time; infinity for the end of another call of the caller.
        """
        user_id = queue.user_id
        if user_id is None:
            return now
        paced_until = self._paces.get(user_id, 0.0)
        if paced_until > now:
            return paced_until
        is_flood = queue.is_flood
        max_count = 1 if is_flood or paced_until else USER_PERMITS
        if count >= max_count or self._in_flight.get(user_id, 0) >= MAX_CALLS_PER_USER:
            return math.inf
        if is_flood and now < self._next_of_flood_at and self._untaken.longest_queue > MAX_UNTAKEN:
            return now + _BACKLOG_INTERVAL_S
        return now

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
        self._paces.forget(now)
        if self._queues:
            self._grant()
        is_used = self._receipts or self._paces
        self._sweep_timer = (
            self._loop.call_later(_SWEEP_INTERVAL_S, self._sweep) if is_used else None
        )

    def _expire_for_waiting(self, now: float) -> None:
        """End a slow call for each caller that waits: of those who receive most, the oldest."""
        counts = self._counts()
        free_count = self.permit_count - counts.total()
        # Others wait for their pace or for a call of their own.
        waiting = [
            key
            for key, queue in self._queues.items()
            if counts[key] >= free_count and self._starts_at(queue, counts[key], now) <= now
        ]
        fewest = min((counts[key] for key in waiting), default=0)
        for _ in waiting:
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

    def _expire(self, receipt: Receipt, error: errors.ServiceError) -> None:
        self._expired_count += 1
        self._receipts.discard(receipt)
        task = self._loop.create_task(_abort(receipt, error))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def close(self) -> None:
        """Stop the timers."""
        self._is_closed = True
        for timer in (self._sweep_timer, self._grant_timer):
            if timer is not None:
                timer.cancel()


async def _abort(receipt: Receipt, error: errors.ServiceError) -> None:
    """End a call from outside its task, whose `read` then raises AbortError.

    Cancelling the task would leave the read to gRPC, which would leak the request. A call whose
    request has arrived at the last moment is served: the client must not repeat it.
    """
    if receipt.is_received:
        return
    with suppress(aio.AbortError, ExecuteBatchError):
        await status.abort(receipt.context, error)
