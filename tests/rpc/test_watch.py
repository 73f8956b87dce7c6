"""WatchMessages: stored messages, then new ones, once and in order; and how a watch ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import message_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import StatusCode

from service.rpc.messages import AFTER_CREATE_TIME
from service.server import Server
from service.store import watch
from tests.conftest import StartProcess
from tests.support import failures
from tests.support.chat import Chat, new_id, new_message, new_messages
from tests.support.cluster import Cluster, fetch
from tests.support.history import read_valid_history
from tests.support.servers import channel, connected, serving
from tests.support.statements import SentStatements

ENOUGH = 20.0
"""Seconds after which a message that was not received is not expected any more."""


class Follower:
    """A client that watches a session and records the messages."""

    def __init__(self, chat: Chat, session_id: str, after_seq: int = 0) -> None:
        self.after_seq = after_seq
        self.got: list[message_pb2.Message] = []
        self._call = chat.watch(session_id, after_seq)
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for reply in self._call:
            self.got.append(reply.message)
            self._came.set()

    @property
    def seqs(self) -> list[int]:
        return [message.seq for message in self.got]

    async def reaches(self, seq: int) -> None:
        """Wait until a message with this seq or a later one is received."""
        async with asyncio.timeout(ENOUGH):
            while not self.got or self.got[-1].seq < seq:
                self._came.clear()
                waiting = asyncio.create_task(self._came.wait())
                await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
                if self._task.done():
                    waiting.cancel()
                    await asyncio.wait([waiting])
                    await self._task
                    raise AssertionError(f"the stream has ended after {self.seqs}")

    async def ends(self) -> failures.Failure:
        """Wait for the end of the stream and return how it failed."""
        async with asyncio.timeout(ENOUGH):
            return await failures.failure_of(self._task)

    async def leave(self) -> None:
        self._call.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()


@asynccontextmanager
async def following(chat: Chat, session_id: str, after_seq: int = 0) -> AsyncGenerator[Follower]:
    follower = Follower(chat, session_id, after_seq)
    try:
        yield follower
    finally:
        await follower.leave()


@pytest.fixture
async def pair(database_url: str) -> AsyncGenerator[tuple[Chat, Chat]]:
    """Yield one user's chat through each of two servers."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(database_url)) for _ in range(2)]
        stubs = [await stack.enter_async_context(connected(server.address)) for server in servers]
        first = await Chat.of_new_user(stubs[0])
        yield first, Chat(stubs[1], first.user_id)


@asynccontextmanager
async def three_followers(chat: Chat, session_id: str) -> AsyncGenerator[failures.Failure]:
    """Watch a session three times, which is the limit, and yield the failure of a fourth watch."""
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await (await stack.enter_async_context(following(chat, session_id))).reaches(1)
        async with following(chat, session_id) as follower:
            ended = await follower.ends()
        yield ended


async def test_watchers_of_two_processes_receive_every_append(
    start_process: StartProcess, database_url: str
) -> None:
    """Watchers on both, from the first message and from the middle, before and during the load."""
    async with AsyncExitStack() as stack:
        processes = await asyncio.gather(start_process(), start_process())
        stubs = [
            await stack.enter_async_context(connected(process.address)) for process in processes
        ]
        chats = [await Chat.of_new_user(stubs[0])]
        chats.append(Chat(stubs[1], chats[0].user_id))
        session = await chats[0].create_session()
        await chats[0].append(session.id, new_messages(7))
        followers = [
            await stack.enter_async_context(following(chat, session.id, after_seq))
            for chat in chats
            for after_seq in (0, 5, 7)
        ]

        async def write(number: int) -> None:
            for turn in range(8):
                await chats[number % 2].append(
                    session.id, new_messages(1 + turn % 3, f"{number}.{turn}")
                )
                if turn == 3 and number < 2:
                    followers.append(
                        await stack.enter_async_context(following(chats[number], session.id))
                    )

        await asyncio.gather(*map(write, range(12)))
        stored = (await read_valid_history(database_url, chats[0].user_id, session.id)).messages
        for follower in followers:
            await follower.reaches(len(stored))
            assert follower.seqs == list(range(follower.after_seq + 1, len(stored) + 1))
            assert [(m.id, m.content) for m in follower.got] == [
                (m.id, m.content) for m in stored[follower.after_seq :]
            ]


async def test_watch_replays_a_long_session(chat: Chat) -> None:
    session_id = await chat.start(new_messages(100))
    for _ in range(3):
        await chat.append(session_id, new_messages(100))
    async with following(chat, session_id) as follower:
        await follower.reaches(400)
        await chat.append(session_id, "live")
        await follower.reaches(401)
        assert follower.seqs == list(range(1, 402))
        assert [m.SerializeToString() for m in follower.got] == [
            m.SerializeToString() for m in await chat.all(session_id)
        ]


async def test_watch_sends_no_deletions_or_edits(chat: Chat) -> None:
    messages = new_messages(6)
    session_id = await chat.start(messages)
    await chat.delete(session_id, messages[1].id)
    await chat.delete(session_id, messages[5].id)
    async with following(chat, session_id) as follower:
        await follower.reaches(5)
        await chat.update(session_id, messages[0].id, ["content"], content="edited")
        await chat.delete(session_id, messages[2].id)
        await chat.append(session_id, messages[1:2])  # A late retry of a deleted message.
        await chat.append(session_id, "live")
        await follower.reaches(7)
        assert follower.seqs == [1, 3, 4, 5, 7]
        assert follower.got[0].content == "message 1"


@pytest.mark.parametrize("after_seq", [3, 4, 2**63 - 1])
async def test_watch_after_a_seq_that_the_session_lacks_is_out_of_range(
    chat: Chat, after_seq: int
) -> None:
    session_id = await chat.start(new_messages(2))
    async with following(chat, session_id, after_seq) as follower:
        ended = await follower.ends()
    assert ended.code is StatusCode.OUT_OF_RANGE
    assert (ended.reason, ended.retry_after) == ("HISTORY_RESTORED", None)
    assert ended.metadata == {"session_id": session_id, "last_seq": "2"}


async def test_watch_after_the_last_seq_waits_for_the_next(chat: Chat) -> None:
    messages = new_messages(2)
    session_id = await chat.start(messages)
    await chat.delete(session_id, messages[1].id)
    async with following(chat, session_id, after_seq=2) as follower:
        await chat.append(session_id, "next")
        await follower.reaches(3)
        assert follower.seqs == [3]


async def test_watch_that_is_resumed_with_the_time_of_its_last_message_goes_on(chat: Chat) -> None:
    messages = new_messages(3)
    session_id = await chat.start(messages)
    await chat.delete(session_id, messages[0].id)
    stored = await chat.all(session_id)
    for message in stored:
        time_us = message.create_time.ToMicroseconds()
        watch = chat.watch(session_id, message.seq, metadata=((AFTER_CREATE_TIME, str(time_us)),))
        await chat.append(session_id, "next")
        assert (await watch.read()).message.seq == message.seq + 1
        watch.cancel()


async def test_watch_that_is_resumed_after_another_message_is_out_of_range(chat: Chat) -> None:
    session_id = await chat.start(new_messages(3))
    last = (await chat.all(session_id))[-1]
    time_us = last.create_time.ToMicroseconds() - 1
    watch = chat.watch(session_id, 3, metadata=((AFTER_CREATE_TIME, str(time_us)),))
    await failures.assert_fails(
        anext(aiter(watch)), "HISTORY_RESTORED", session_id=session_id, last_seq=3
    )


@pytest.mark.parametrize("text", ["yesterday", "-1", "1.5", str(2**63), "9" * 400])
async def test_time_of_a_resumed_watch_must_be_a_number(chat: Chat, text: str) -> None:
    session_id = await chat.start()
    watch = chat.watch(session_id, 1, metadata=((AFTER_CREATE_TIME, text),))
    await failures.assert_field_violations(anext(aiter(watch)), AFTER_CREATE_TIME)


@pytest.mark.parametrize("eraser", [0, 1], ids=["same server", "other server"])
async def test_deletion_of_the_session_ends_the_watch(pair: tuple[Chat, Chat], eraser: int) -> None:
    session_id = await pair[0].start(new_messages(3))
    async with following(pair[0], session_id) as follower:
        await follower.reaches(3)
        await pair[eraser].delete_session(session_id)
        ended = await follower.ends()
    assert (ended.reason, ended.metadata) == ("SESSION_NOT_FOUND", {"session_id": session_id})
    assert follower.seqs == [1, 2, 3]


@pytest.mark.parametrize("eraser", [0, 1], ids=["same server", "other server"])
async def test_watch_ends_when_the_session_is_recreated(
    pair: tuple[Chat, Chat], eraser: int
) -> None:
    session_id = await pair[0].start(new_messages(3))
    async with following(pair[0], session_id) as follower:
        await follower.reaches(3)
        await pair[eraser].delete_session(session_id)
        await pair[eraser].append(session_id, new_messages(3, "new"), create_if_missing=True)
        assert (await follower.ends()).reason == "SESSION_NOT_FOUND"
    assert follower.seqs == [1, 2, 3]


async def test_watch_sends_nothing_of_a_session_recreated_between_polls(
    pair: tuple[Chat, Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted on another server and created again between two polls; its append wakes the watch."""
    monkeypatch.setattr(watch, "POLL_INTERVAL_S", 600.0)
    session_id = await pair[0].start(new_messages(3))
    async with following(pair[0], session_id) as follower:
        await follower.reaches(3)
        await pair[1].delete_session(session_id)
        await pair[0].append(session_id, new_messages(9, "new"), create_if_missing=True)
        assert (await follower.ends()).reason == "SESSION_NOT_FOUND"
    assert follower.seqs == [1, 2, 3]


async def test_deletion_of_the_user_ends_the_watch(chat: Chat) -> None:
    session_id = await chat.start(new_messages(2))
    async with following(chat, session_id) as follower:
        await follower.reaches(2)
        await chat.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
        assert (await follower.ends()).reason == "SESSION_NOT_FOUND"


@pytest.mark.case(n=19)
async def test_watch_of_a_missing_or_foreign_session_is_not_found(chat: Chat, other: Chat) -> None:
    session_id = await chat.start()
    for owner, requested_id in ((chat, new_id()), (other, session_id)):
        async with following(owner, requested_id) as follower:
            ended = await follower.ends()
        assert (ended.reason, ended.metadata) == ("SESSION_NOT_FOUND", {"session_id": requested_id})


async def test_draining_ends_the_watch(database_url: str) -> None:
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(3))
        async with following(chat, session_id) as follower:
            await follower.reaches(3)
            stopping = asyncio.create_task(server.stop())
            ended = await follower.ends()
            await stopping
        assert ended.reason == "DRAINING"
        assert ended.retry_after is not None


async def test_watches_above_the_limit_are_rejected(database_url: str) -> None:
    async with serving(database_url, max_watches=3) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with three_followers(chat, session_id) as ended:
            assert ended.reason == "OVERLOADED"
            await chat.append(session_id, "others are served")
        while server.streams.in_flight:
            await asyncio.sleep(0.01)
        async with following(chat, session_id) as follower:
            await follower.reaches(2)


async def test_watches_leave_room_for_calls_on_their_connection(database_url: str) -> None:
    async with (
        serving(database_url, max_calls_per_connection=6) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with three_followers(chat, session_id) as ended:
            assert ended.reason == "OVERLOADED"
            assert "open another" in ended.message
            assert ended.retry_after
            await chat.append(session_id, "calls find room")
            async with (
                connected(server.address) as other,
                following(Chat(other, chat.user_id), session_id) as follower,
            ):
                await follower.reaches(2)
        while server.streams.in_flight:
            await asyncio.sleep(0.01)
        async with following(chat, session_id) as follower:
            await follower.reaches(2)


async def test_watch_survives_loss_of_the_database_connections(
    chat: Chat, database_url: str, server: Server
) -> None:
    session_id = await chat.start(new_messages(2))
    async with following(chat, session_id) as follower:
        await follower.reaches(2)
        for turn in range(3, 6):
            await fetch(
                database_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            await chat.append(session_id, f"{turn}")
            await follower.reaches(turn)
        assert follower.seqs == [1, 2, 3, 4, 5]


async def test_slow_watcher_delays_no_other_call(chat: Chat, server: Server) -> None:
    """The server does not read ahead of it without bound, and at the end it has every message."""
    large = "x" * 100_000
    session_id = await chat.start([new_message(large) for _ in range(20)])
    for _ in range(4):
        await chat.append(session_id, [new_message(large) for _ in range(20)])
    # A channel of its own with a small window, so that flow control stops the server.
    async with channel(
        server.address, **{"http2.lookahead_bytes": 65_536, "http2.bdp_probe": 0}
    ) as narrow:
        slow: Any = Chat(ChatHistoryServiceStub(narrow), chat.user_id).watch(session_id)
        first = await slow.read()
        async with following(chat, session_id) as quick:
            await quick.reaches(100)
            await chat.append(session_id, "live")
            await quick.reaches(101)
        got = [first.message.seq]
        while got[-1] < 101:
            reply = await slow.read()
            assert isinstance(reply, message_pb2.WatchMessagesResponse), "the stream ended"
            got.append(reply.message.seq)
        assert got == list(range(1, 102))
        slow.cancel()


async def test_one_poll_serves_all_watches_and_none_is_sent_without_any(
    chat: Chat, server: Server, cluster: Cluster, database_url: str
) -> None:
    session_ids = [await chat.start() for _ in range(5)]
    async with AsyncExitStack() as stack:
        followers = [
            await stack.enter_async_context(following(chat, session_id))
            for session_id in session_ids
            for _ in range(3)
        ]
        await asyncio.gather(*(follower.reaches(1) for follower in followers))
        sent = SentStatements(cluster, database_url)
        latest: list[str] = []
        async with asyncio.timeout(ENOUGH):
            # Once all have caught up, nothing is sent but the poll.
            while len(latest) < 4 or len(set(latest)) > 1:
                await asyncio.sleep(0.05)
                # Behind a pooler the poll is a transaction.
                latest = [
                    statement.sql
                    for statement in sent.so_far()
                    if not statement.sql.startswith(("BEGIN", "COMMIT"))
                ][-4:]
    while (
        server.streams.in_flight or server.database.hot_pool._busy
    ):  # The last poll may have been in flight.
        await asyncio.sleep(0.01)
    sent = SentStatements(cluster, database_url)
    await asyncio.sleep(1.0)  # The time of three polls.
    assert sent.so_far() == []


async def test_cancelled_watches_leave_no_watcher_behind(chat: Chat, server: Server) -> None:
    session_id = await chat.start()

    async def come_and_go() -> None:
        async with following(chat, session_id) as follower:
            await follower.reaches(1)

    async with asyncio.TaskGroup() as group:
        for n in range(40):
            group.create_task(come_and_go())
            group.create_task(chat.append(session_id, f"{n}"))
    while server.streams.in_flight or len(server.watchers):
        await asyncio.sleep(0.01)
