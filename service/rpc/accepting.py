"""A gRPC server that takes calls up from all connections in turn.

grpc.aio asks gRPC for one call of each method, and for the next one after some turns of the event
loop and a hand-over between threads. gRPC keeps the calls that wait in one queue for all
connections, and those that were cancelled stay in it: 1,200 calls that one connection has cancelled
delay the calls of all others by half a second.

This server asks for several calls at the same time and keeps those that wait itself, a queue for
each connection.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

from grpc import aio
from grpc._cython import cygrpc

from service.rpc import wake_ups

FEW_ACCEPTS = 16
"""Calls of a method that are accepted at the same time."""
MANY_ACCEPTS = 64
"""The same while many wait. Each accept takes several turns of the loop, in which calls are taken
up: fewer accepts would leave calls in gRPC, others' among them."""
MAX_IN_ORDER = 16
"""Calls of a method that are taken up in the order of their arrival. If more wait, connections take
turns."""
DROP_INTERVAL_S = 0.01
MIN_DROPS = 10
"""Calls whose deadlines have passed that are dropped after each interval, at least."""
DROPPED_SHARE = 1 / 100
"""Share of them that is dropped, so that most stay for about a second, however many they are."""
MAX_WAITING = 32_768
"""Calls of a method that wait here. Further ones wait in gRPC."""


class UntakenCalls:
    """The calls of all methods that wait to be taken up."""

    def __init__(self) -> None:
        self._methods: list[_Calls] = []

    def add(self, calls: _Calls) -> None:
        """Count the calls of another method."""
        self._methods.append(calls)

    @property
    def waiting_count(self) -> int:
        """Number of calls that wait."""
        return sum(calls.waiting_count for calls in self._methods)

    @property
    def longest_queue(self) -> int:
        """Number of calls that wait, of the method with most of them."""
        return max((calls.waiting_count for calls in self._methods), default=0)

    @property
    def dropped_count(self) -> int:
        """Calls since the start that were not taken up, since their deadlines had passed."""
        return sum(calls.dropped_count for calls in self._methods)


class _Calls:
    """The calls of a method that wait to be taken up, as a future of the next one.

    grpc.aio passes it to `asyncio.wait`, again and again, and takes the result.
    """

    def __init__(self, accept: Callable[[], asyncio.Future[Any]]) -> None:
        """Start to accept calls.

        Args:
            accept: Asks gRPC for a call.
        """
        self._accept = accept
        self._in_order: deque[asyncio.Future[Any]] = deque()
        self._by_connection: OrderedDict[str, deque[asyncio.Future[Any]]] = OrderedDict()
        """The calls of each connection, if many wait; the connection in front is next."""
        self._waiting_count = 0
        self._accepting_count = 0
        self.dropped_count = 0
        """Calls since the start that were not taken up, since their deadlines had passed."""
        self._dropped: deque[asyncio.Future[Any]] = deque()
        """Calls that are not taken up, since their deadlines have passed."""
        self._drop_timer: asyncio.TimerHandle | None = None
        self._callback: Callable[[Any], object] | None = None
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._failed: asyncio.Future[Any] | None = None
        """An accept that gRPC has failed, as it does with all when it shuts down."""
        self._start_accepts()

    @property
    def waiting_count(self) -> int:
        """Number of calls that wait."""
        return self._waiting_count

    def _start_accepts(self) -> None:
        if self._is_closed:
            return
        limit = MANY_ACCEPTS if self._by_connection else FEW_ACCEPTS
        while self._accepting_count < limit and self._waiting_count < MAX_WAITING:
            self._accepting_count += 1
            self._accept().add_done_callback(self._accepted)

    def _accepted(self, task: asyncio.Future[Any]) -> None:
        self._accepting_count -= 1
        if task.cancelled():  # By the end of the loop: gRPC is not asked again.
            return
        if self._is_closed:
            if task.exception() is None:
                return
            self._failed = task  # Wakes grpc.aio, which ends then.
            if self._callback is not None:
                self._callback(self)
            return
        if not self._by_connection and len(self._in_order) < MAX_IN_ORDER:
            self._in_order.append(task)
            self._waiting_count += 1
        elif connection := _connection_of(task):
            self._by_connection.setdefault(connection, deque()).append(task)
            self._waiting_count += 1
        else:
            self._drop_later(task)
        self._start_accepts()
        if self._callback is not None and self._waiting_count:
            self._callback(self)

    def _drop_later(self, task: asyncio.Future[Any]) -> None:
        """Drop a call whose deadline has passed, which takes less time than to take it up.

        Not immediately: until then it occupies a stream of its connection, so that gRPC refuses
        further ones.
        """
        self.dropped_count += 1
        self._dropped.append(task)
        if self._drop_timer is None:
            self._drop_timer = self._loop.call_later(DROP_INTERVAL_S, self._drop)

    def _drop(self) -> None:
        count = max(MIN_DROPS, int(len(self._dropped) * DROPPED_SHARE))
        for _ in range(min(len(self._dropped), count)):
            del self._dropped[0]
        self._drop_timer = (
            self._loop.call_later(DROP_INTERVAL_S, self._drop) if self._dropped else None
        )

    # The methods of a future that `asyncio.wait`, `asyncio.gather` and grpc.aio call.

    def done(self) -> bool:
        return self._waiting_count > 0 or self._failed is not None

    def result(self) -> Any:
        if self._failed is not None:
            return self._failed.result()
        self._waiting_count -= 1
        if self._in_order:
            task = self._in_order.popleft()
        else:
            connection, tasks = self._by_connection.popitem(last=False)
            task = tasks.popleft()
            if tasks:
                self._by_connection[connection] = tasks
        self._start_accepts()
        return task.result()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callback = callback
        if self.done():
            self._loop.call_soon(callback, self)

    def remove_done_callback(self, _callback: Callable[[Any], object]) -> None:
        self._callback = None

    def cancel(self) -> None:
        self.close()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()

    def close(self) -> None:
        """Drop the calls that wait, for which gRPC would wait at its end.

        gRPC fails the accepts. They must not be cancelled before, since gRPC writes into them.
        """
        self._is_closed = True
        self._waiting_count = 0
        if self._drop_timer is not None:
            self._drop_timer.cancel()
        self._dropped.clear()
        self._in_order.clear()
        self._by_connection.clear()


def _connection_of(task: asyncio.Future[Any]) -> str:
    """Return gRPC's name of a call's connection; empty for a call whose deadline has passed.

    gRPC clears the name when it cancels a call for its deadline. If gRPC has failed the accept,
    there is no call, and any name will do: the failure is taken up like a call.
    """
    if task.exception() is not None:
        return "none"
    context = cygrpc._ServicerContext(task.result(), None, None, None)  # noqa: SLF001
    peer: str = context.peer()
    return peer if peer or context.time_remaining() == 0 else "unknown"


class _Server(cygrpc.AioServer):  # type: ignore[misc] # it has no types
    """Overrides the methods that register RPCs, that ask gRPC for the next call, and that stop."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._calls: dict[bytes | None, _Calls] = {}
        """The waiting calls of each registered method and, under None, of all others."""
        self.own_queues: Collection[str] = ()
        self.untaken = UntakenCalls()

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        # Generated code registers every method. Each one costs every call a little.
        super().add_registered_method_handlers(
            {name: handler for name, handler in handlers.items() if name in self.own_queues}
        )

    def _make_request_call_future(self, method: bytes | None) -> _Calls:
        calls = self._calls.get(method)
        if calls is None:
            make = super()._make_request_call_future
            calls = self._calls[method] = _Calls(lambda: make(method))
            self.untaken.add(calls)
        return calls

    async def shutdown(self, grace: float | None) -> None:
        for calls in self._calls.values():
            calls.close()
        await super().shutdown(grace)


def create_server(
    options: Sequence[tuple[str, int]], own_queues: Collection[str], untaken: UntakenCalls
) -> aio.Server:
    """Return a server; a usual one if grpcio has changed.

    Args:
        options: Its channel arguments.
        own_queues: Full names of the methods with queues of their own, once they are registered:
            their calls do not wait behind those of other methods.
        untaken: Counts the calls that wait.
    """
    usual = cygrpc.AioServer
    is_known = hasattr(usual, "_make_request_call_future")
    with wake_ups.all_read_together():
        if not is_known:
            return aio.server(options=options)
        cygrpc.AioServer = _Server
        try:
            server = aio.server(options=options)
        finally:
            cygrpc.AioServer = usual
    calls = server._server  # type: ignore[attr-defined] # noqa: SLF001
    calls.own_queues, calls.untaken = own_queues, untaken
    return server
