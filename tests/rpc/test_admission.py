"""Overload: excess calls get a retry delay, and a flood of one user does not reject others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import failures
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.history import read_valid_history
from tests.support.servers import channel, connected, serving
from tests.support.statements import database_name


@pytest.mark.case(n=18)
async def test_flood_of_one_user_is_rejected_and_other_users_are_served(
    database_url: str, cluster: Cluster
) -> None:
    """The flood's calls hang, so that no finished call makes room; 2,000 exceed the limit."""
    limit = 40
    async with (
        serving(database_url, max_in_flight=limit) as server,
        connected(server.address) as stub,
    ):
        flooder, other = await Chat.of_new_user(stub), await Chat.of_new_user(stub)
        mine, theirs = await flooder.create_session(), await other.start()
        holder = await cluster.connect(database_name(database_url))
        try:
            async with holder.transaction(), channel(server.address) as opened:
                await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", mine.id)
                flood = [
                    asyncio.create_task(flooder.update_session(["title"], id=mine.id, title=f"{n}"))
                    for n in range(2000)
                ]
                while (
                    server.calls.in_flight < limit
                    or sum(task.done() for task in flood) < 2000 - limit
                ):
                    await asyncio.sleep(0.01)
                health: Any = health_pb2_grpc.HealthStub(opened)
                for turn in range(5):
                    async with asyncio.timeout(10):
                        await other.append(theirs, f"{turn}")
                        await other.page(theirs)
                        await other.update_session(["title"], id=theirs, title=f"{turn}")
                        await asyncio.gather(*(other.context(theirs) for _ in range(4)))
                        reply = await health.Check(health_pb2.HealthCheckRequest())
                        assert reply.status == health_pb2.HealthCheckResponse.SERVING
                    refused = await failures.assert_fails(
                        flooder.get_session(mine.id), "OVERLOADED"
                    )
                    assert refused.retry_after
        finally:
            await holder.close()
        done = await asyncio.gather(*flood, return_exceptions=True)
        refusals = [result for result in done if isinstance(result, BaseException)]
        assert len(done) - len(refusals) == limit
        for refusal in refusals:
            assert isinstance(refusal, aio.AioRpcError)
            failure = failures.read_failure(refusal)
            assert (failure.reason, bool(failure.retry_after)) == ("OVERLOADED", True)
        await flooder.get_session(mine.id)


async def test_calls_above_the_limit_of_a_connection_wait_at_the_client(
    cluster: Cluster, database_url: str
) -> None:
    async with (
        serving(database_url, max_calls_per_connection=8) as server,
        connected(server.address) as stub,
        channel(server.address) as opened,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        holder = await cluster.connect(database_name(database_url))
        try:
            async with holder.transaction():
                await holder.execute(
                    "SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session_id
                )
                sent = [asyncio.create_task(chat.append(session_id, f"{n}")) for n in range(40)]
                while server.calls.in_flight < 8:
                    await asyncio.sleep(0.01)
                for _ in range(20):
                    await asyncio.sleep(0.01)
                    assert server.calls.in_flight == 8
                # Other clients have connections of their own.
                health: Any = health_pb2_grpc.HealthStub(opened)
                reply = await health.Check(health_pb2.HealthCheckRequest())
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            await holder.close()
        replies = await asyncio.gather(*sent)
    history = await read_valid_history(database_url, chat.user_id, session_id)
    history.check_contains(replies)
    assert history.last_seq == 41
