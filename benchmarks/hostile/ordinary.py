"""The process of the ordinary users of a soak, `python -m benchmarks.hostile.ordinary`.

Each user converses: it appends, reads the context and the list, searches, follows the session, and
starts another session from time to time. Nothing is retried, and every call must succeed. After a
line `stop` on its input the process compares the stored messages with the acknowledged ones and
prints the result.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import uvloop
from chathistory.v1 import message_pb2, session_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

from benchmarks.hostile.account import Account
from benchmarks.hostile.calls import CHANNEL_OPTIONS, status_of
from benchmarks.hostile.outcome import quantile_ms

_CALL_TIMEOUT_S = 10.0
_PAUSE_S = 0.2
"""Mean pause of a user between two turns of the conversation."""
_TURNS = 200
"""Turns after which a user starts another session."""
_SEARCH_TURNS = 10
"""Turns after which a user searches."""
_CHECK_ATTEMPTS = 20


def main() -> None:
    """Converse until the input says `stop`."""
    count = int(sys.stdin.readline())
    accounts = [Account.from_json(sys.stdin.readline()) for _ in range(count)]
    uvloop.run(_serve(accounts))


async def _serve(accounts: Sequence[Account]) -> None:
    async with AsyncExitStack() as stack:
        users = []
        for account in accounts:
            channel = aio.insecure_channel(account.address, options=CHANNEL_OPTIONS)
            users.append(OrdinaryUser(account, await stack.enter_async_context(channel)))
        print("ready", flush=True)  # noqa: T201 - read by the parent process
        tasks = [asyncio.create_task(user.converse()) for user in users]
        await asyncio.to_thread(sys.stdin.readline)
        for user in users:
            user.stop()
        await asyncio.gather(*tasks)
        for user in users:
            await user.check()
        print(json.dumps(_result(users)), flush=True)  # noqa: T201 - read by the parent process


def _result(users: Sequence[OrdinaryUser]) -> dict[str, Any]:
    durations_s = [duration_s for user in users for duration_s in user.durations_s]
    failures = sum((user.failures for user in users), Counter[str]())
    return {
        "calls": len(durations_s),
        "failures": dict(failures),
        "p99_ms": round(quantile_ms(durations_s, 0.99), 1),
        "max_ms": round(quantile_ms(durations_s, 1.0), 1),
        "sessions": sum(len(user.acknowledged) for user in users),
        "messages": sum(len(ids) for user in users for ids in user.acknowledged.values()),
        "watched": sum(user.watched for user in users),
        "problems": [problem for user in users for problem in user.problems],
    }


class OrdinaryUser:
    """One user: its conversation, and the messages that were acknowledged to it."""

    def __init__(self, account: Account, channel: aio.Channel) -> None:
        self._stub: Any = ChatHistoryServiceStub(channel)
        self._user_id = account.user_id
        self._metadata = account.metadata()
        self._chance = random.Random(account.user_id)  # noqa: S311 - pauses, no secrets
        self._end = asyncio.Event()
        self.acknowledged: dict[str, list[str]] = {}
        """Ids of the messages of each session, in the order of their `seq`."""
        self.failures: Counter[str] = Counter()
        self.durations_s: list[float] = []
        self.problems: list[str] = []
        self.watched = 0

    def stop(self) -> None:
        """End the conversation after the current turn."""
        self._end.set()

    async def converse(self) -> None:
        """Converse in one session after the other."""
        while not self._end.is_set():
            session_id = str(uuid.uuid4())
            self.acknowledged[session_id] = []
            await self._append(session_id)
            watch = asyncio.create_task(self._watch(session_id))
            for turn in range(_TURNS):
                if self._end.is_set():
                    break
                await self._turn(session_id, turn)
                await asyncio.sleep(self._chance.uniform(0, 2 * _PAUSE_S))
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _turn(self, session_id: str, turn: int) -> None:
        key: dict[str, Any] = {"user_id": self._user_id, "session_id": session_id}
        await self._append(session_id)
        context = message_pb2.GetContextRequest(**key)
        page = message_pb2.ListMessagesRequest(**key, order=message_pb2.MESSAGE_ORDER_DESC)
        for rpc, request in (("GetContext", context), ("ListMessages", page)):
            reply = await self._call(rpc, request)
            if reply is not None and len(reply.messages) != min(50, turn + 2):
                self._problem(f"{rpc} of {turn + 2} messages returned {len(reply.messages)}")
        if turn % _SEARCH_TURNS == 0:
            search = message_pb2.SearchMessagesRequest(**key, query="ordinary message")
            await self._call("SearchMessages", search)
            sessions = session_pb2.ListSessionsRequest(user_id=self._user_id)
            await self._call("ListSessions", sessions)

    async def _append(self, session_id: str) -> None:
        message_id = str(uuid.uuid4())
        ids = self.acknowledged[session_id]
        reply = await self._call(
            "AppendMessages",
            message_pb2.AppendMessagesRequest(
                user_id=self._user_id,
                session_id=session_id,
                create_if_missing=True,
                messages=[
                    message_pb2.Message(
                        id=message_id,
                        role=message_pb2.ROLE_USER,
                        content=f"ordinary message {len(ids) + 1}",
                    )
                ],
            ),
        )
        if reply is None:
            return
        ids.append(message_id)
        if reply.messages[0].seq != len(ids):
            self._problem(f"seq {reply.messages[0].seq} instead of {len(ids)}")

    async def _call(self, rpc: str, request: Any) -> Any:
        """Make a call; None if it fails."""
        started = time.perf_counter()
        try:
            return await getattr(self._stub, rpc)(
                request, metadata=self._metadata, timeout=_CALL_TIMEOUT_S
            )
        except aio.AioRpcError as error:
            self.failures[f"{rpc} {status_of(error)}"] += 1
            return None
        finally:
            self.durations_s.append(time.perf_counter() - started)

    async def _watch(self, session_id: str) -> None:
        request = message_pb2.WatchMessagesRequest(user_id=self._user_id, session_id=session_id)
        stream = self._stub.WatchMessages(request, metadata=self._metadata)
        expected = 1
        try:
            async for reply in stream:
                if reply.message.seq != expected:
                    self._problem(f"a watch showed seq {reply.message.seq}, not {expected}")
                expected = reply.message.seq + 1
                self.watched += 1
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED or not self._end.is_set():
                self.failures[f"WatchMessages {status_of(error)}"] += 1
        finally:
            stream.cancel()

    def _problem(self, text: str) -> None:
        self.problems.append(text)

    async def check(self) -> None:
        """Compare every session with the acknowledged messages, in order and without gaps."""
        for session_id, ids in self.acknowledged.items():
            stored = await self._stored(session_id)
            if [message_id for _, message_id in stored] != ids:
                self._problem(f"{len(ids)} messages acknowledged, {len(stored)} stored")
            if [seq for seq, _ in stored] != list(range(1, len(stored) + 1)):
                self._problem("a session has a gap")

    async def _stored(self, session_id: str) -> list[tuple[int, str]]:
        stored: list[tuple[int, str]] = []
        token = ""
        for _ in range(_CHECK_ATTEMPTS):
            request = message_pb2.ListMessagesRequest(
                user_id=self._user_id, session_id=session_id, page_size=1000, page_token=token
            )
            reply = await self._call("ListMessages", request)
            if reply is None:
                continue
            stored += [(message.seq, message.id) for message in reply.messages]
            token = reply.next_page_token
            if not token:
                break
        return stored


if __name__ == "__main__":
    main()
