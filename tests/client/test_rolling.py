"""Replicas are replaced one after the other under load, as a deployment does it: whoever uses the client library notices nothing."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.conftest import StartProcess
from tests.support.clients import client_of
from tests.support.conversations import conversations
from tests.support.history import history
from tests.support.record import judge
from tests.support.servers import ServerProcess

USERS = 12


async def replaced(process: ServerProcess, start_process: StartProcess) -> ServerProcess:
    """End a replica as a deployment does, and start the next one in its place."""
    process.send(signal.SIGTERM)
    # Well within the grace, though streams are open.
    assert await process.wait(30) == 0
    log = await asyncio.to_thread(process.log.read_text)
    assert "Traceback" not in log
    return await start_process(
        CHAT_HISTORY_LISTEN=process.address, CHAT_HISTORY_SHUTDOWN_GRACE="60"
    )


@pytest.mark.faults
@pytest.mark.case(n=17)
@pytest.mark.timeout(240)
async def test_a_rolling_restart_shows_users_no_error(
    start_process: StartProcess, database_url: str
) -> None:
    replicas = [await start_process(CHAT_HISTORY_SHUTDOWN_GRACE="60") for _ in range(2)]
    target = "ipv4:" + ",".join(replica.address for replica in replicas)
    async with client_of(target) as client, conversations(client, USERS) as records:
        for _ in range(2):
            for number, replica in enumerate(replicas):
                await asyncio.sleep(1)
                replicas[number] = await replaced(replica, start_process)
        await asyncio.sleep(1)
    for record in records:
        assert judge(record, await history(database_url, record.user_id, record.session_id)) == []
    print(f"{sum(record.acknowledged for record in records)} messages")
