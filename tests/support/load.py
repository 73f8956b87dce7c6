"""A write load whose result is checked: nothing acknowledged is lost, duplicated or moved."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from chathistory.v1 import message_pb2
from grpc import StatusCode, aio

from tests.support.chat import Chat, new_id
from tests.support.history import read_history
from tests.support.record import Record, SeenMessage, judge, new_marked_message, seen_message

RETRYABLE_CODES = {
    StatusCode.UNAVAILABLE,
    StatusCode.ABORTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.RESOURCE_EXHAUSTED,
}
"""Codes after which a client retries with the same ids: rejections, and unknown outcomes."""
CALL_TIMEOUT_S = 5.0


class Load:
    """Several writers and a follower for each of several sessions.

    A writer repeats its request until it is acknowledged. A follower resumes after its last message
    when its stream breaks.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        sessions: int = 4,
        writers: int = 3,
        seed: int = 1,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._chat = chat
        self._call_timeout_s = call_timeout_s
        self._random = random.Random(seed)
        self.session_ids = [new_id() for _ in range(sessions)]
        self._writers = [session_id for session_id in self.session_ids for _ in range(writers)]
        self.records = {id_: Record(chat.user_id, id_) for id_ in self.session_ids}
        self.seen: dict[str, list[SeenMessage]] = {id_: [] for id_ in self.session_ids}
        """The messages that the follower of each session has received."""
        self.refusals: dict[str, int] = {}
        """The number of failed appends by status code."""
        self.count = 0
        """The number of acknowledged messages."""
        self._started_at = time.monotonic()
        self._stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Write during a block; at its end, complete every request that is in flight."""
        writing = [asyncio.create_task(self._write(session_id)) for session_id in self._writers]
        following = [
            asyncio.create_task(self._follow(session_id)) for session_id in self.session_ids
        ]
        try:
            yield
            self._stopping = True
            await asyncio.gather(*writing)
            async with asyncio.timeout(30):
                for session_id in self.session_ids:
                    last = self.records[session_id].last_seq
                    while not self.seen[session_id] or self.seen[session_id][-1][0] < last:
                        await asyncio.sleep(0.02)
        finally:
            for task in (*writing, *following):
                task.cancel()
            await asyncio.wait([*writing, *following])

    async def wait_for_appends(self, count: int) -> None:
        """Wait until `count` more messages have been acknowledged."""
        goal = self.count + count
        async with asyncio.timeout(60):
            while self.count < goal:
                await asyncio.sleep(0.01)

    async def _write(self, session_id: str) -> None:
        while not self._stopping:
            messages = [
                new_marked_message(self._random.randint(40, 340))
                for _ in range(self._random.randint(1, 3))
            ]
            sent = self.records[session_id].send(messages)
            request = message_pb2.AppendMessagesRequest(
                user_id=self._chat.user_id,
                session_id=session_id,
                messages=messages,
                create_if_missing=True,
            )
            sent.acknowledge(await self._until_acknowledged(request))
            self.count += len(messages)

    async def _until_acknowledged(
        self, request: message_pb2.AppendMessagesRequest
    ) -> message_pb2.AppendMessagesResponse:
        while True:
            try:
                return await self._chat.stub.AppendMessages(request, timeout=self._call_timeout_s)
            except aio.AioRpcError as error:
                if error.code() not in RETRYABLE_CODES:
                    raise
                self.refusals[error.code().name] = self.refusals.get(error.code().name, 0) + 1
            await asyncio.sleep(self._random.uniform(0.01, 0.2))

    async def _follow(self, session_id: str) -> None:
        seen = self.seen[session_id]
        while True:
            with suppress(aio.AioRpcError):
                async for reply in self._chat.watch(session_id, seen[-1][0] if seen else 0):
                    seen.append(seen_message(reply.message))
            await asyncio.sleep(0.05)

    async def check(self, database_url: str) -> None:
        """Assert that exactly the acknowledged messages are stored: once, in order, as followed.

        Every request must have been completed.
        """
        for session_id, record in self.records.items():
            record.saw_stream(self._started_at, 0, self.seen[session_id])
            stored = await read_history(database_url, self._chat.user_id, session_id)
            assert judge(record, stored) == []
            assert stored is not None
            assert stored.last_seq == record.acknowledged, "a request was not completed"


def fast_reconnect_options(**options: int) -> dict[str, int]:
    """Return options of a channel that soon reconnects to a restarted server."""
    return {
        "initial_reconnect_backoff_ms": 50,
        "min_reconnect_backoff_ms": 50,
        "max_reconnect_backoff_ms": 200,
    } | options
