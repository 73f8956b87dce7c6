"""Users of the client library that call it continuously and fail on every error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from chathistory_client import ChatHistoryClient
from tests.support.record import Record, SeenMessage, new_marked_message, seen_message


class Conversation:
    """Continuous appends and reads of one user's session, and a follower. No error is caught."""

    def __init__(self, client: ChatHistoryClient, record: Record) -> None:
        self.record = record
        self._client = client
        self._stopping = False
        self._seen: list[SeenMessage] = []

    async def run(self) -> None:
        """Append and read until `stop` is called, then wait until the follower has seen all."""
        begun = time.monotonic()
        following: asyncio.Task[None] | None = None
        try:
            while not self._stopping:
                messages = [new_marked_message(200), new_marked_message(200)]
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
            self._seen.append(seen_message(message))


@asynccontextmanager
async def conversations(client: ChatHistoryClient, count: int) -> AsyncGenerator[list[Record]]:
    """Run conversations of `count` users during a block, and provide their records."""
    user_ids = [(await client.create_user(name="a user")).id for _ in range(count)]
    # A user's only session has the same id as the user.
    running = [Conversation(client, Record(user_id, user_id)) for user_id in user_ids]
    async with asyncio.TaskGroup() as group:
        for conversation in running:
            group.create_task(conversation.run())
        yield [conversation.record for conversation in running]
        for conversation in running:
            conversation.stop()
