"""Users of the client library who talk all the time and notice every error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from chathistory_client import ChatHistoryClient
from tests.support.record import Place, Record, place, said


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
                    await self._client.append_messages(
                        messages=messages, create_if_missing=True, **self.record.name
                    )
                )
                following = following or asyncio.create_task(self._follow())
                asked = time.monotonic()
                self.record.saw_context(
                    asked, await self._client.get_context(max_messages=20, **self.record.name)
                )
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


@asynccontextmanager
async def conversations(client: ChatHistoryClient, count: int) -> AsyncGenerator[list[Record]]:
    """Have so many users talk during a block, and give what they do and see."""
    owners = [(await client.create_user(name="somebody")).id for _ in range(count)]
    talks = [Conversation(client, Record(owner, owner)) for owner in owners]
    async with asyncio.TaskGroup() as group:
        for talk in talks:
            group.create_task(talk.talk())
        yield [talk.record for talk in talks]
        for talk in talks:
            talk.stop()
