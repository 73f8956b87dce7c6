"""Replicas are replaced one after the other under load, as a deployment does it: whoever uses the client library notices nothing."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from chathistory_client import ChatHistoryClient
from tests.conftest import StartProcess
from tests.support.clients import client_of
from tests.support.history import history
from tests.support.record import Place, Record, judge, place, said
from tests.support.servers import ServerProcess

USERS = 12


class Conversation:
    """One user's session: appends and reads all the time, and somebody who follows it. No error is caught."""

    def __init__(self, client: ChatHistoryClient, record: Record) -> None:
        self.record = record
        self._client = client
        self._stopping = False
        self._seen: list[Place] = []

    async def talk(self) -> None:
        """Append and read until `stop`, then until the follower has seen all."""
        begun = time.monotonic()
        following: asyncio.Task[None] | None = None
        try:
            while not self._stopping:
                messages = [said(200), said(200)]
                sent = self.record.send(messages)
                sent.acknowledge(
                    await self._client.append_messages(messages=messages, create_if_missing=True, **self.record.name)
                )
                following = following or asyncio.create_task(self._follow())
                asked = time.monotonic()
                self.record.saw_context(asked, await self._client.get_context(max_messages=20, **self.record.name))
                asked = time.monotonic()
                self.record.saw_session(asked, await self._client.get_session(**self.record.name))
                assert not following.done()
            async with asyncio.timeout(30):
                while not self._seen or self._seen[-1][0] < self.record.last_seq:
                    await asyncio.sleep(0.02)
            self.record.saw_stream(begun, 0, self._seen)
        finally:
            if following is not None:
                following.cancel()
                await asyncio.wait([following])

    def stop(self) -> None:
        self._stopping = True

    async def _follow(self) -> None:
        async for message in self._client.watch_messages(**self.record.name):
            self._seen.append(place(message))


async def replaced(process: ServerProcess, start_process: StartProcess) -> ServerProcess:
    """End a replica as a deployment does, and start the next one in its place."""
    process.send(signal.SIGTERM)
    # Well within the grace, though streams are open.
    assert await process.wait(30) == 0
    log = await asyncio.to_thread(process.log.read_text)
    assert "Traceback" not in log
    return await start_process(CHAT_HISTORY_LISTEN=process.address, CHAT_HISTORY_SHUTDOWN_GRACE="60")


@pytest.mark.faults
@pytest.mark.case(n=17)
@pytest.mark.timeout(240)
async def test_a_rolling_restart_shows_users_no_error(start_process: StartProcess, database_url: str) -> None:
    replicas = [await start_process(CHAT_HISTORY_SHUTDOWN_GRACE="60") for _ in range(2)]
    target = "ipv4:" + ",".join(replica.address for replica in replicas)
    async with client_of(target) as client:
        owners = [(await client.create_user(name="somebody")).id for _ in range(USERS)]
        conversations = [Conversation(client, Record(owner, owner)) for owner in owners]
        async with asyncio.TaskGroup() as group:
            for conversation in conversations:
                group.create_task(conversation.talk())
            for _ in range(2):
                for number, replica in enumerate(replicas):
                    await asyncio.sleep(1)
                    replicas[number] = await replaced(replica, start_process)
            await asyncio.sleep(1)
            for conversation in conversations:
                conversation.stop()
    for conversation in conversations:
        record = conversation.record
        assert judge(record, await history(database_url, record.user_id, record.session_id)) == []
    print(f"{sum(each.record.acknowledged for each in conversations)} messages")
