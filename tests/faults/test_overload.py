"""Four times the load that is let in: the excess is told when to come again, and what is let in is carried.

How fast is measured elsewhere (`python -m benchmarks overload`); what must hold on any machine is here.
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

LIMIT = 16
SECONDS = 4.0
ROUNDS = 3
SHARE = 0.5
"""Of what it carries at its best, what it must still carry."""


class Callers:
    """Callers who append one after the other, each to a session of its own; who is refused waits for as long as it is told."""

    def __init__(self, chats: list[Chat]) -> None:
        self.chats = chats
        self.session_ids = [new_id() for _ in chats]
        self.acknowledged: list[list[message_pb2.AppendMessagesResponse]] = [[] for _ in chats]
        self.refused = 0
        self._until = 0.0

    @classmethod
    async def of_new_users(cls, stub: AsyncStub, count: int) -> Callers:
        chats = [await Chat.of_new_user(stub) for _ in range(8)]
        return cls([chats[n % len(chats)] for n in range(count)])

    @property
    def count(self) -> int:
        return sum(map(len, self.acknowledged))

    async def call(self, seconds: float) -> float:
        """Have all of them call for so long; return how many calls a second were answered well."""
        before, started = self.count, time.monotonic()
        self._until = started + seconds
        await asyncio.gather(*map(self._caller, range(len(self.chats))))
        return (self.count - before) / (time.monotonic() - started)

    async def _caller(self, number: int) -> None:
        while time.monotonic() < self._until:
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
                found = failures.read_failure(error)
                assert found.reason == "OVERLOADED", found
                assert found.retry_after
                self.refused += 1
                await asyncio.sleep(found.retry_after)


async def probe(address: str, took: list[float]) -> None:
    """Ask for readiness again and again, as an orchestrator does."""
    async with channel(address) as opened:
        health: Any = health_pb2_grpc.HealthStub(opened)
        while True:
            started = time.monotonic()
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            took.append(time.monotonic() - started)
            await asyncio.sleep(0.05)


async def call_concurrently(many: Callers, database_url: str) -> float:
    """Have all of them call, and all be under way in the beginning: else the load is what their own machine lets them send."""
    async with connected_to(database_url) as holder, holder.transaction():
        await holder.execute("LOCK TABLE chat_sessions IN ACCESS EXCLUSIVE MODE")
        refused = many.refused
        calling = asyncio.create_task(many.call(SECONDS))
        while many.refused == refused:
            await asyncio.sleep(0.01)
    return await calling


@pytest.mark.case(n=18)
async def test_overload_is_rejected_while_goodput_and_health_hold(
    start_process: StartProcess, database_url: str
) -> None:
    process = await start_process(CHAT_HISTORY_MAX_IN_FLIGHT=str(LIMIT))
    took: list[float] = []
    async with connected(process.address) as stub:
        fitting = await Callers.of_new_users(stub, LIMIT)
        many = await Callers.of_new_users(stub, 4 * LIMIT)
        await fitting.call(1.0)
        probing = asyncio.create_task(probe(process.address, took))
        shares: list[float] = []
        # A machine that others use too: what is compared lies close together, and once is enough. A collapse would show every time.
        while len(shares) < ROUNDS and (not shares or shares[-1] < SHARE):
            before = await fitting.call(SECONDS / 2)
            goodput = await call_concurrently(many, database_url)
            after = await fitting.call(SECONDS / 2)
            shares.append(goodput / min(before, after))
            print(
                f"before {before:.0f}/s, overloaded {goodput:.0f}/s, after {after:.0f}/s, refused {many.refused}"
            )
        alive = not probing.done()
        probing.cancel()
        with suppress(asyncio.CancelledError):
            await probing
    print(f"health: {max(took):.3f} s at the most")
    assert fitting.refused == 0
    assert many.refused > 0
    assert shares[-1] >= SHARE, shares
    assert alive
    assert len(took) > SECONDS, "health kept answering"
    for callers in (fitting, many):
        for chat, session_id, replies in zip(
            callers.chats, callers.session_ids, callers.acknowledged, strict=True
        ):
            if replies:
                found = await read_valid_history(database_url, chat.user_id, session_id)
                found.check_contains(replies)
                assert found.last_seq == len(replies), (
                    "what was refused was not stored, and what was acknowledged was"
                )
