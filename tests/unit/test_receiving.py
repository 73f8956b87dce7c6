"""Receiving of requests: who waits, and races that a client cannot cause on purpose."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import aio
from grpc._cython.cygrpc import EOF  # type: ignore[import-not-found]

from service.auth.caller import Caller
from service.errors import Overloaded
from service.rpc import caller_queues, receiving, user_paces
from service.rpc.receiving import RequestReceiver

USER_ID = "0192d3a4-0000-7000-8000-000000000001"
OTHER_ID = "0192d3a4-0000-7000-8000-000000000002"


class FakeContext:
    """The context of a call whose request arrives when the test says so."""

    def __init__(self, peer: str = "") -> None:
        self.request: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.is_aborted = False
        self.is_read = False
        self.is_over = False
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        return 0 if self.is_over else None

    async def read(self) -> Any:
        self.is_read = True
        data = await self.request
        if self.is_aborted:
            raise aio.AbortError
        return data

    async def abort(self, *_status: Any) -> None:
        self.is_aborted = True
        if not self.request.done():
            self.request.set_result(b"")
        raise aio.AbortError


async def expired_while_arriving(*, arrives_first: bool) -> tuple[FakeContext, Any]:
    """Let a request arrive in the turn of the event loop in which its time is up."""
    context: Any = FakeContext()
    receiver = RequestReceiver(timeout_s=0)
    received = asyncio.create_task(receiver.receive(context, Caller(user_id=USER_ID)))
    await asyncio.sleep(0.01)
    for step in (
        (lambda: context.request.set_result(b"request"), receiver._sweep)
        if arrives_first
        else (receiver._sweep, lambda: context.request.set_result(b"request"))
    ):
        step()
    (result,) = await asyncio.gather(received, return_exceptions=True)
    await asyncio.sleep(0.01)
    receiver.close()
    return context, result


async def test_request_that_arrives_before_its_call_is_ended_is_served() -> None:
    """A call that is served and also ended with an error would be repeated by the client."""
    context, result = await expired_while_arriving(arrives_first=True)
    assert result == b"request"
    assert not context.is_aborted


async def test_call_that_is_ended_before_its_request_arrives_is_not_served() -> None:
    context, result = await expired_while_arriving(arrives_first=False)
    assert isinstance(result, aio.AbortError)
    assert context.is_aborted


class Callers:
    """Calls to one receiver, whose requests arrive when the test says so."""

    def __init__(self) -> None:
        self.receiver = RequestReceiver()
        self.tasks: list[asyncio.Task[bytes]] = []

    async def start(self, user_id: str | None, count: int = 1) -> list[FakeContext]:
        """Start calls of a user, or of a service, and let them read if they may."""
        contexts: list[Any] = [FakeContext(f"ipv4:{user_id}") for _ in range(count)]
        for context in contexts:
            received = self.receiver.receive(context, Caller(user_id=user_id))
            self.tasks.append(asyncio.create_task(received))
        await turn()
        return contexts

    async def send(self, user_id: str | None, n_bytes: int) -> None:
        """Send a request that is received immediately."""
        [context] = await self.start(user_id)
        assert context.is_read
        context.request.set_result(bytes(n_bytes))
        await turn()

    async def end(self) -> None:
        """Cancel the calls that are left."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.receiver.close()


@pytest.fixture
async def callers() -> AsyncGenerator[Callers]:
    callers = Callers()
    yield callers
    await callers.end()


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def read_count(contexts: list[FakeContext]) -> int:
    return sum(context.is_read for context in contexts)


async def test_user_who_has_sent_large_requests_waits_and_others_do_not(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_paces, "USER_BYTES_PER_SECOND", 1)
    await callers.send(USER_ID, user_paces.PACED_BYTES + 1)
    waiting = await callers.start(USER_ID, 3)
    assert read_count(waiting) == 0
    assert read_count(await callers.start(OTHER_ID)) == 1
    callers.receiver._paces[USER_ID] = 1.0
    callers.receiver._grant()
    await turn()
    assert read_count(waiting) == 1, "after a large request they are received one by one"


async def test_burst_and_small_requests_are_not_paced(callers: Callers) -> None:
    await callers.send(USER_ID, user_paces.USER_BYTES_PER_SECOND // 8)
    for _ in range(100):
        await callers.send(USER_ID, user_paces.PACED_BYTES)


async def test_service_is_not_paced(callers: Callers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_paces, "USER_BYTES_PER_SECOND", 1)
    for _ in range(3):
        await callers.send(None, user_paces.PACED_BYTES + 1)


async def test_waiting_calls_are_received_once_the_pace_allows(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_paces, "PACE_BURST_S", 0)
    n_bytes = user_paces.PACED_BYTES + 1
    for number in range(3):
        [context] = await callers.start(USER_ID)
        assert context.is_read is (number == 0)
        while not context.is_read:
            await asyncio.sleep(0.001)
        context.request.set_result(bytes(n_bytes))
        await turn()
    assert [len(task.result()) for task in callers.tasks] == [n_bytes] * 3


async def test_request_that_fails_to_arrive_counts_as_a_large_one(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPC decompresses a request before it finds that it is too large."""
    monkeypatch.setattr(user_paces, "USER_BYTES_PER_SECOND", 1)
    [context] = await callers.start(USER_ID)
    context.request.set_result(EOF)
    await turn()
    assert read_count(await callers.start(USER_ID)) == 0


async def test_pace_is_forgotten_once_it_is_over(callers: Callers) -> None:
    await callers.send(USER_ID, user_paces.PACED_BYTES + 1)
    callers.receiver._paces[USER_ID] -= 1
    callers.receiver._sweep()
    assert not callers.receiver._paces


async def test_flood_of_a_user_is_received_one_by_one(callers: Callers) -> None:
    few = await callers.start(USER_ID, receiving.USER_PERMITS + 2)
    assert read_count(few) == receiving.USER_PERMITS
    many = await callers.start(USER_ID, caller_queues.MAX_QUEUED_PER_USER)
    for context in few[: receiving.USER_PERMITS]:
        context.request.set_result(b"request")
        await turn()
    assert read_count([*few, *many]) == receiving.USER_PERMITS + 1
    assert read_count(await callers.start(OTHER_ID)) == 1


async def test_call_that_was_over_before_it_was_received_does_not_count(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the calls that an overload has ended would slow down their users."""
    monkeypatch.setattr(user_paces, "USER_BYTES_PER_SECOND", 1)
    monkeypatch.setattr(receiving, "USER_PERMITS", 0)  # Every call of a user is checked.
    callers.receiver._unchecked_count = 0
    [context] = await callers.start(USER_ID)
    assert not context.is_read
    context.is_over = True
    monkeypatch.setattr(receiving, "USER_PERMITS", 4)
    callers.receiver._grant()
    await turn()
    context.request.set_result(EOF)
    await turn()
    assert not callers.receiver._paces


async def test_slow_request_is_not_ended_for_a_user_who_waits_for_its_pace(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_paces, "USER_BYTES_PER_SECOND", 1)
    callers.receiver._contended_timeout_s = -1
    [slow] = await callers.start(OTHER_ID)
    await callers.send(USER_ID, user_paces.PACED_BYTES + 1)
    await callers.start(USER_ID)
    callers.receiver._sweep()
    await turn()
    assert not slow.is_aborted


async def test_user_with_many_calls_in_flight_waits_until_one_ends(callers: Callers) -> None:
    user, service = Caller(user_id=USER_ID), Caller()
    for _ in range(receiving.MAX_CALLS_PER_USER):
        callers.receiver.call_started(user)
        callers.receiver.call_started(service)
    waiting = await callers.start(USER_ID)
    assert read_count(waiting) == 0
    assert read_count(await callers.start(OTHER_ID)) == 1
    assert read_count(await callers.start(None)) == 1
    callers.receiver.call_ended(service)
    await turn()
    assert read_count(waiting) == 0
    callers.receiver.call_ended(user)
    await turn()
    assert read_count(waiting) == 1


async def test_ended_calls_of_a_user_are_forgotten(callers: Callers) -> None:
    for caller in (Caller(user_id=USER_ID), Caller()):
        callers.receiver.call_started(caller)
        callers.receiver.call_ended(caller)
    assert not callers.receiver._in_flight


async def test_flood_waits_while_others_calls_may_wait_to_be_taken_up(callers: Callers) -> None:
    queue = SimpleNamespace(waiting_count=receiving.MAX_UNTAKEN + 1)
    callers.receiver._untaken.add(queue)  # type: ignore[arg-type]
    callers.receiver._next_of_flood_at = math.inf
    few = await callers.start(USER_ID, receiving.USER_PERMITS)
    many = await callers.start(USER_ID, caller_queues.MAX_QUEUED_PER_USER + 1)
    for context in few:
        context.request.set_result(b"request")
    await turn()
    assert read_count(many) == 0
    assert read_count(await callers.start(OTHER_ID)) == 1
    queue.waiting_count = 0
    callers.receiver._grant()
    await turn()
    assert read_count(many) == 1


async def test_end_of_many_waiting_calls_starts_one_search_for_the_next(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for the next call after each one would hold the loop for all that wait."""
    count = 500
    grants = 0
    grant = RequestReceiver._grant

    def count_grants(receiver: RequestReceiver) -> None:
        nonlocal grants
        grants += 1
        grant(receiver)

    reading = await callers.start(USER_ID, receiving.USER_PERMITS)
    waiting = await callers.start(USER_ID, count)
    other = await callers.start(OTHER_ID)
    monkeypatch.setattr(RequestReceiver, "_grant", count_grants)
    for task in callers.tasks[len(reading) : len(reading) + count]:
        task.cancel()
    await turn()
    await turn()
    assert callers.receiver.waiting_count == 0
    assert grants < 10
    assert other[0].is_read
    assert not any(context.is_read for context in waiting)


async def test_excess_of_a_callers_waiting_calls_is_rejected(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "MAX_WAITING", 8)
    callers.receiver = RequestReceiver()
    await callers.start(USER_ID, receiving.USER_PERMITS + 20)
    assert callers.receiver.waiting_count <= 10
    rejected = [task for task in callers.tasks if task.done()]
    assert rejected
    assert all(isinstance(task.exception(), Overloaded) for task in rejected)
