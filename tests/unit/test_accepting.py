"""The order in which calls are taken up, and when they are dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import aio
from grpc._cython import cygrpc

from service.rpc import accepting
from service.rpc.accepting import MAX_IN_ORDER, UntakenCalls, _Calls, create_server

DEAD = ""


class Grpc:
    """gRPC, which hands over a call for each request, when the test says so."""

    def __init__(self) -> None:
        self.requests: list[asyncio.Future[Any]] = []
        self.calls = _Calls(self._accept)

    def _accept(self) -> Any:
        request = asyncio.get_running_loop().create_future()
        self.requests.append(request)
        return request

    async def hand_over(self, *connections: str) -> None:
        """Hand over a call of each of these connections."""
        for connection in connections:
            self.requests.pop(0).set_result(connection)
            await asyncio.sleep(0)

    def take(self, count: int) -> list[str]:
        """Take calls up."""
        return [self.calls.result() for _ in range(count)]


@pytest.fixture
async def grpc(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Grpc]:
    monkeypatch.setattr(accepting, "_connection_of", lambda task: task.result())
    grpc = Grpc()
    yield grpc
    grpc.calls.close()
    for request in grpc.requests:
        request.cancel()


async def test_few_calls_are_taken_up_in_order(grpc: Grpc) -> None:
    assert not grpc.calls.done()
    await grpc.hand_over("a", "a", "b")
    assert grpc.calls.done()
    assert grpc.take(3) == ["a", "a", "b"]
    assert not grpc.calls.done()


async def test_connections_take_turns_when_many_calls_wait(grpc: Grpc) -> None:
    await grpc.hand_over(*["a"] * (MAX_IN_ORDER + 5), "b", "c", "b")
    taken = grpc.take(MAX_IN_ORDER + 8)
    assert taken[MAX_IN_ORDER:] == ["a", "b", "c", "a", "b", "a", "a", "a"]
    assert not grpc.calls.done()


async def test_calls_whose_deadlines_have_passed_are_dropped_if_many_wait(
    grpc: Grpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "DROP_INTERVAL_S", 0)
    await grpc.hand_over(*["a"] * MAX_IN_ORDER, *[DEAD] * 25, "b")
    assert grpc.take(MAX_IN_ORDER + 1)[-1] == "b"
    assert not grpc.calls.done()
    async with asyncio.timeout(10):
        while grpc.calls._dropped:
            await asyncio.sleep(0)


async def test_calls_beyond_the_limit_stay_in_grpc(
    grpc: Grpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "MAX_WAITING", 3)
    while grpc.requests:
        await grpc.hand_over("a")
    assert 3 <= grpc.calls.waiting_count < 2 * accepting.FEW_ACCEPTS
    grpc.take(grpc.calls.waiting_count)
    assert len(grpc.requests) >= accepting.FEW_ACCEPTS


async def test_more_calls_are_accepted_at_the_same_time_while_many_wait(grpc: Grpc) -> None:
    assert len(grpc.requests) == accepting.FEW_ACCEPTS
    await grpc.hand_over(*["a"] * (MAX_IN_ORDER + 1))
    assert len(grpc.requests) == accepting.MANY_ACCEPTS


async def test_waiter_is_notified_of_the_next_call(grpc: Grpc) -> None:
    waiting = asyncio.create_task(asyncio.wait([grpc.calls]))  # type: ignore[type-var] # a double
    await asyncio.sleep(0)
    await grpc.hand_over("a")
    done, pending = await waiting
    assert (done, pending) == ({grpc.calls}, set())
    # A call that waits already.
    done, _ = await asyncio.wait([grpc.calls])  # type: ignore[type-var]
    assert done == {grpc.calls}


async def test_closing_drops_the_calls_that_wait_and_those_that_still_come(grpc: Grpc) -> None:
    await grpc.hand_over(*["a"] * (MAX_IN_ORDER + 1), DEAD)
    grpc.calls.close()
    await grpc.hand_over("a")
    assert not grpc.calls.done()
    assert not grpc.calls._dropped
    assert list(await asyncio.gather(grpc.calls, return_exceptions=True)) == [None]


async def test_end_of_grpc_wakes_the_server(grpc: Grpc) -> None:
    waiting = asyncio.create_task(asyncio.wait([grpc.calls]))  # type: ignore[type-var]
    await asyncio.sleep(0)
    grpc.calls.close()
    grpc.requests.pop().set_exception(ConnectionError())
    done, _ = await waiting
    with pytest.raises(ConnectionError):
        done.pop().result()


async def test_another_grpcio_serves_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = cygrpc.AioServer
    monkeypatch.setattr(accepting, "cygrpc", SimpleNamespace(AioServer=object))
    server = create_server([], (), UntakenCalls())
    assert isinstance(server, aio.Server)
    assert type(server._server) is usual  # type: ignore[attr-defined]


async def test_failed_accept_is_taken_up_like_a_call(grpc: Grpc) -> None:
    grpc.requests.pop(0).set_exception(ConnectionError())
    await asyncio.sleep(0)
    assert grpc.calls.done()
    with pytest.raises(ConnectionError):
        grpc.calls.result()
    assert len(grpc.requests) == accepting.FEW_ACCEPTS
