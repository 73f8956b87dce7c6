"""Four times the admitted load: the excess is rejected with a retry delay, the rest is served.

`python -m benchmarks overload` measures the speed. This test checks what must hold on any machine.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import StartProcess
from tests.support import failures
from tests.support.chat import Chat, new_id, new_messages
from tests.support.cluster import connected_to
from tests.support.history import read_valid_history
from tests.support.servers import AsyncStub, channel, connected

MAX_IN_FLIGHT = 16
DURATION_S = 4.0
MAX_ROUNDS = 3
MIN_SHARE = 0.5
"""The share of the throughput without overload that must remain under overload."""


class Callers:
    """Callers that append in a loop, each to its own session, and obey the delay of a rejection."""

    def __init__(self, chats: list[Chat]) -> None:
        self.chats = chats
        self.session_ids = [new_id() for _ in chats]
        self.acknowledged: list[list[message_pb2.AppendMessagesResponse]] = [[] for _ in chats]
        self.rejected = 0
        self._stop_at = 0.0

    @classmethod
    async def of_new_users(cls, stub: AsyncStub, count: int) -> Callers:
        chats = [await Chat.of_new_user(stub) for _ in range(8)]
        return cls([chats[n % len(chats)] for n in range(count)])

    @property
    def count(self) -> int:
        return sum(map(len, self.acknowledged))

    async def call(self, duration_s: float) -> float:
        """Run all callers for this time; return the successful calls per second."""
        before, started = self.count, time.monotonic()
        self._stop_at = started + duration_s
        await asyncio.gather(*map(self._call, range(len(self.chats))))
        return (self.count - before) / (time.monotonic() - started)

    async def _call(self, number: int) -> None:
        while time.monotonic() < self._stop_at:
            request = message_pb2.AppendMessagesRequest(
                user_id=self.chats[number].user_id,
                session_id=self.session_ids[number],
                messages=new_messages(1),
                create_if_missing=True,
            )
            try:
                self.acknowledged[number].append(
                    await self.chats[number].stub.AppendMessages(request, timeout=60)
                )
            except aio.AioRpcError as error:
                failure = failures.read_failure(error)
                assert failure.reason == "OVERLOADED", failure
                assert failure.retry_after
                self.rejected += 1
                await asyncio.sleep(failure.retry_after)


async def probe(address: str, durations_s: list[float]) -> None:
    """Check readiness repeatedly, as an orchestrator does, and append the durations."""
    async with channel(address) as connection:
        health: Any = health_pb2_grpc.HealthStub(connection)
        while True:
            started = time.monotonic()
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            durations_s.append(time.monotonic() - started)
            await asyncio.sleep(0.05)


async def overload(callers: Callers, database_url: str) -> float:
    """Run the callers and block the first calls until one was rejected; return calls per second.

    Without the block, the load would be limited to the rate at which this machine sends.
    """
    async with connected_to(database_url) as holder, holder.transaction():
        await holder.execute("LOCK TABLE chat_sessions IN ACCESS EXCLUSIVE MODE")
        rejected = callers.rejected
        calling = asyncio.create_task(callers.call(DURATION_S))
        while callers.rejected == rejected:
            await asyncio.sleep(0.01)
    return await calling


@pytest.mark.case(n=18)
async def test_overload_is_rejected_while_goodput_and_health_hold(
    start_process: StartProcess, database_url: str
) -> None:
    process = await start_process(CHAT_HISTORY_MAX_IN_FLIGHT=str(MAX_IN_FLIGHT))
    durations_s: list[float] = []
    async with connected(process.address) as stub:
        admitted = await Callers.of_new_users(stub, MAX_IN_FLIGHT)
        excessive = await Callers.of_new_users(stub, 4 * MAX_IN_FLIGHT)
        await admitted.call(1.0)
        probing = asyncio.create_task(probe(process.address, durations_s))
        shares: list[float] = []
        # Other programs use the machine too, so the measurements of a round follow each other
        # closely, and one good round is enough. A collapse would show in every round.
        while len(shares) < MAX_ROUNDS and (not shares or shares[-1] < MIN_SHARE):
            before = await admitted.call(DURATION_S / 2)
            goodput = await overload(excessive, database_url)
            after = await admitted.call(DURATION_S / 2)
            shares.append(goodput / min(before, after))
            print(
                f"before {before:.0f}/s, overloaded {goodput:.0f}/s, after {after:.0f}/s, "
                f"rejected {excessive.rejected}"
            )
        is_probing = not probing.done()
        probing.cancel()
        with suppress(asyncio.CancelledError):
            await probing
    print(f"health: {max(durations_s):.3f} s at most")
    assert admitted.rejected == 0
    assert excessive.rejected > 0
    assert shares[-1] >= MIN_SHARE, shares
    assert is_probing, "a health check failed"
    assert len(durations_s) > DURATION_S, "health checks were not answered"
    for callers in (admitted, excessive):
        for chat, session_id, replies in zip(
            callers.chats, callers.session_ids, callers.acknowledged, strict=True
        ):
            if replies:
                stored = await read_valid_history(database_url, chat.user_id, session_id)
                stored.check_contains(replies)
                assert stored.last_seq == len(replies), (
                    "exactly the acknowledged messages must be stored"
                )
