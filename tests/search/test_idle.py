"""An idle service with search on sends no statement, so that Neon can suspend the database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.server import Server
from tests.search.library import Library
from tests.search.waits import wait_until_indexed
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.servers import channel
from tests.support.statements import SentStatements

pytestmark = pytest.mark.faults  # An idle service is observed.


@pytest.mark.parametrize(
    "seconds", [4, pytest.param(60, marks=[pytest.mark.faults, pytest.mark.timeout(150)])]
)
async def test_idle_service_with_the_embedded_index_sends_no_statement(
    server: Server, chat: Chat, library: Library, cluster: Cluster, database_url: str, seconds: int
) -> None:
    sent = SentStatements(cluster, database_url)
    session_id = await chat.start("herons wade")
    await library.create(["Herons are wading birds."], title="birds")
    await wait_until_indexed(server)
    # The indexer reads the outbox once more, and used connections return to the pool.
    await asyncio.sleep(3)
    count = len(sent.so_far())
    assert count > 0
    async with channel(server.address) as opened:
        health: Any = health_pb2_grpc.HealthStub(opened)
        for _ in range(seconds):
            for name in ("", "liveness", "search"):
                await health.Check(health_pb2.HealthCheckRequest(service=name))
            await asyncio.sleep(1)
    assert sent.so_far()[count:] == []
    await chat.append(session_id, "they do")
    assert len(sent.so_far()) > count
