"""A rolling restart under load causes no error for users of the client library."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.conftest import StartProcess
from tests.support.clients import client_of
from tests.support.conversations import conversations
from tests.support.history import read_history
from tests.support.record import judge
from tests.support.servers import ServerProcess

USERS = 12


async def replace(process: ServerProcess, start_process: StartProcess) -> ServerProcess:
    """Stop a replica as a deployment does, and start its successor at the same address."""
    process.send_signal(signal.SIGTERM)
    # Within the grace period of 60 s, although streams are open.
    assert await process.wait(30) == 0
    log = await asyncio.to_thread(process.log.read_text)
    assert "Traceback" not in log
    return await start_process(
        CHAT_HISTORY_LISTEN=process.address, CHAT_HISTORY_SHUTDOWN_GRACE="60"
    )


@pytest.mark.faults
@pytest.mark.case(n=17)
@pytest.mark.timeout(240)
async def test_rolling_restart_under_load_causes_no_client_error(
    start_process: StartProcess, database_url: str
) -> None:
    replicas = [await start_process(CHAT_HISTORY_SHUTDOWN_GRACE="60") for _ in range(2)]
    target = "ipv4:" + ",".join(replica.address for replica in replicas)
    async with client_of(target) as client, conversations(client, USERS) as records:
        for _ in range(2):
            for number, replica in enumerate(replicas):
                await asyncio.sleep(1)
                replicas[number] = await replace(replica, start_process)
        await asyncio.sleep(1)
    for record in records:
        assert (
            judge(record, await read_history(database_url, record.user_id, record.session_id)) == []
        )
    print(f"{sum(record.acknowledged for record in records)} messages")
