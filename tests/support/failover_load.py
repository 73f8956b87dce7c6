"""Clients that write and read during failovers, and a log of what health reports."""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import cycle, pairwise
from typing import TypeVar

from chathistory.v1 import message_pb2, session_pb2
from grpc import aio
from grpc_status import rpc_status

from tests.rpc.test_health import Probe
from tests.support.chat import Chat, new_id
from tests.support.failures import read_failure
from tests.support.load import RETRYABLE_CODES
from tests.support.record import Record, new_marked_message

A = TypeVar("A")
T = TypeVar("T")

SESSIONS, WRITERS = 4, 3
CALL_TIMEOUT_S = 5.0
MAX_MESSAGES = 20
"""Of a view, so that the views of a long run fit into memory."""
HEALTH_INTERVAL_S = 0.05


class Clients:
    """Some writers and a reader for each of several sessions. They repeat calls until they succeed.

    Unlike `Load` it has no followers: a failover that loses commits ends their watches.
    """

    def __init__(self, chat: Chat, seed: int) -> None:
        self._chat = chat
        self._random = random.Random(seed)
        self.records = [Record(chat.user_id, new_id()) for _ in range(SESSIONS)]
        self.errors: Counter[str] = Counter()
        """Failed calls, by code and reason."""
        self.acknowledged_at: list[float] = []
        """The times of all acknowledgements, on the monotonic clock."""
        self._is_stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Write and read during a block; at its end, complete every call that is in flight.

        A call that fails in a way that it must not cancels the block.
        """
        async with asyncio.TaskGroup() as group:
            for record in self.records:
                for _ in range(WRITERS):
                    group.create_task(self._write(record))
                group.create_task(self._read(record))
            yield
            self._is_stopping = True

    async def wait_for_appends(self, count: int, timeout_s: float) -> None:
        """Wait until `count` more appends have been acknowledged."""
        goal = len(self.acknowledged_at) + count
        async with asyncio.timeout(timeout_s):
            while len(self.acknowledged_at) < goal:
                await asyncio.sleep(0.01)

    async def first_acknowledgement(self, since: float, timeout_s: float) -> float:
        """Return the time of the first acknowledgement since a time; wait for it if necessary."""
        async with asyncio.timeout(timeout_s):
            while not self.acknowledged_at or self.acknowledged_at[-1] < since:
                await asyncio.sleep(0.005)
        return self.acknowledged_at[bisect_left(self.acknowledged_at, since)]

    async def _write(self, record: Record) -> None:
        while not self._is_stopping:
            messages = [new_marked_message(self._random.randint(40, 340)) for _ in range(2)]
            sent = record.send(messages)
            request = message_pb2.AppendMessagesRequest(
                user_id=self._chat.user_id,
                session_id=record.session_id,
                messages=messages,
                create_if_missing=True,
            )
            sent.acknowledge(await self._until_it_succeeds(self._append, request))
            self.acknowledged_at.append(time.monotonic())
            await asyncio.sleep(self._random.uniform(0, 0.1))

    async def _append(
        self, request: message_pb2.AppendMessagesRequest
    ) -> message_pb2.AppendMessagesResponse:
        return await self._chat.stub.AppendMessages(request, timeout=CALL_TIMEOUT_S)

    async def _read(self, record: Record) -> None:
        """Read by the calls of each route to the database in turn."""
        while not record.acknowledged:
            await asyncio.sleep(0.01)
        for view in cycle((self._view_context, self._view_page, self._view_session)):
            if self._is_stopping:
                return
            await self._until_it_succeeds(view, record)
            await asyncio.sleep(self._random.uniform(0.05, 0.2))

    async def _view_context(self, record: Record) -> None:
        begun = time.monotonic()
        request = message_pb2.GetContextRequest(max_messages=MAX_MESSAGES, **record.name)
        context = await self._chat.stub.GetContext(request, timeout=CALL_TIMEOUT_S)
        record.saw_context(begun, context)

    async def _view_page(self, record: Record) -> None:
        begun = time.monotonic()
        request = message_pb2.ListMessagesRequest(
            page_size=MAX_MESSAGES, order=message_pb2.MESSAGE_ORDER_DESC, **record.name
        )
        page = await self._chat.stub.ListMessages(request, timeout=CALL_TIMEOUT_S)
        record.saw_newest(begun, page)

    async def _view_session(self, record: Record) -> None:
        begun = time.monotonic()
        request = session_pb2.GetSessionRequest(**record.name)
        reply = await self._chat.stub.GetSession(request, timeout=CALL_TIMEOUT_S)
        record.saw_session(begun, reply.session)

    async def _until_it_succeeds(self, call: Callable[[A], Awaitable[T]], argument: A) -> T:
        while True:
            try:
                return await call(argument)
            except aio.AioRpcError as error:
                self.errors[_name(error)] += 1
                if error.code() not in RETRYABLE_CODES:
                    raise
            await asyncio.sleep(self._random.uniform(0.01, 0.2))


def _name(error: aio.AioRpcError) -> str:
    if rpc_status.from_call(error) is None:  # type: ignore[arg-type]
        return f"{error.code().name} of gRPC"
    return read_failure(error).reason


def longest_pause(times: Sequence[float], since: float, until: float) -> tuple[float, float]:
    """Return the start and the end of the longest pause between two successive times.

    Args:
        times: In ascending order. The last one is `until` or later.
        since: The pause ends after this time.
        until: One of the times, at which the pause ends at the latest.
    """
    first = max(0, bisect_left(times, since) - 1)
    last = bisect_left(times, until)
    return max(pairwise(times[first : last + 1]), key=lambda pause: pause[1] - pause[0])


def longest_error_s(changes: Sequence[tuple[float, bool]], since: float, until: float) -> float:
    """Return for how long health was wrong about an outage at its start, or after its end.

    Args:
        changes: The times at which the answer changed, and whether it is SERVING from then on.
        since: The start of the outage.
        until: Its end. All later changes of the answer count as late.
    """
    reported_at = min(
        (at for at, is_serving in changes if at > since and not is_serving), default=until
    )
    ready_at = max((at for at, is_serving in changes if at > until and is_serving), default=until)
    return max(min(reported_at, until) - since, ready_at - until)


class HealthLog:
    """The answers of health, which is asked all the time."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.changes: list[tuple[float, bool]] = []
        """The times at which the answer changed, and whether it is SERVING from then on."""

    @property
    def is_serving(self) -> bool:
        """The last answer."""
        return bool(self.changes) and self.changes[-1][1]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Ask during a block. A failed health check cancels it."""
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(self._ask())
            yield
            asking.cancel()

    async def _ask(self) -> None:
        while True:
            is_serving = await self._probe.ready()
            if not self.changes or is_serving != self.is_serving:
                self.changes.append((time.monotonic(), is_serving))
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def wait_serving(self, timeout_s: float) -> None:
        """Wait until the answer is SERVING."""
        async with asyncio.timeout(timeout_s):
            while not self.is_serving:
                await asyncio.sleep(0.01)
