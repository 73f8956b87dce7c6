"""Clients that do not read, or send slowly or too much: what the service holds for them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from structlog.testing import capture_logs

from service.rpc import connections
from service.rpc.receiving import RequestReceiver
from service.rpc.server_options import WINDOW_BYTES
from service.server import Server
from service.server_metrics import rejections
from tests.support import failures
from tests.support.chat import Chat, new_message
from tests.support.cluster import Cluster
from tests.support.raw_http2 import SERVICE, RawConnection
from tests.support.servers import channel, connected, serving
from tests.support.statements import SentStatements, database_name
from tests.support.waits import until

MIB = 1024 * 1024
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = "0", "3", "4", "8"


async def large_session(chat: Chat) -> str:
    """Return a session whose page is close to the limit of a reply."""
    return await chat.start([new_message("x" * 200_000) for _ in range(14)])


def free_bytes(server: Server) -> int:
    """Return how many bytes the calls of the only user may hold further."""
    return server.settings.max_bytes_per_user - server.budget.held


def page_request(chat: Chat, session_id: str) -> message_pb2.ListMessagesRequest:
    return message_pb2.ListMessagesRequest(user_id=chat.user_id, session_id=session_id)


async def assert_served(server: Server) -> None:
    """Assert that another user, on another connection, can append and read a large page."""
    async with connected(server.address) as stub, asyncio.timeout(30):
        other = await Chat.of_new_user(stub)
        session_id = await large_session(other)
        assert len((await other.page(session_id)).messages) == 14


# --- Replies that are not read.


async def test_unread_replies_are_bounded_and_other_users_are_served(
    server: Server, chat: Chat
) -> None:
    session_id = await large_session(chat)
    await until(lambda: not server.budget.held)
    limit = server.settings.max_bytes_per_user
    async with RawConnection(server.address) as raw:
        for _ in range(60):
            await raw.call("ListMessages", page_request(chat, session_id))
        fitting = limit // 2_800_000
        await raw.wait_for(60 - fitting)
        assert set(raw.statuses.values()) == {RESOURCE_EXHAUSTED}
        await until(lambda: server.calls.in_flight == fitting)
        assert limit - 2_900_000 < server.budget.held <= limit
        # Large pages are also expensive work, of which one user may let few wait.
        assert sum(rejections(server).values()) == 60 - fitting
        await failures.assert_fails(chat.page(session_id), "OVERLOADED")
        await assert_served(server)
        assert raw.n_bytes_received == 0
    await until(lambda: not server.budget.held and not server.calls.in_flight)
    await chat.page(session_id)


async def test_unread_replies_of_many_users_are_bounded_for_their_connection(
    server: Server,
) -> None:
    async with connected(server.address) as stub:
        chats = [await Chat.of_new_user(stub) for _ in range(4)]
        session_ids = [await large_session(chat) for chat in chats]
        await until(lambda: not server.budget.held)
        limit = server.settings.max_bytes_per_connection
        async with RawConnection(server.address) as raw:
            for _ in range(8):
                for chat, session_id in zip(chats, session_ids, strict=True):
                    await raw.call("ListMessages", page_request(chat, session_id))
            await raw.wait_for(32 - limit // 2_800_000)
            assert set(raw.statuses.values()) == {RESOURCE_EXHAUSTED}
            assert limit - 2_900_000 < server.budget.held <= limit
            assert set(server.budget.rejections) == {"connection"}
            for chat, session_id in zip(chats, session_ids, strict=True):
                await chat.page(session_id)
        await until(lambda: not server.budget.held)


async def test_total_of_unread_replies_keeps_room_for_other_users(database_url: str) -> None:
    async with (
        serving(database_url, max_bytes_in_flight=32 * MIB) as server,
        connected(server.address) as stub,
    ):
        chats = [await Chat.of_new_user(stub) for _ in range(2)]
        session_ids = [await large_session(chat) for chat in chats]
        await until(lambda: not server.budget.held)
        async with RawConnection(server.address) as raw, RawConnection(server.address) as second:
            for _ in range(12):
                await raw.call("ListMessages", page_request(chats[0], session_ids[0]))
                await second.call("ListMessages", page_request(chats[1], session_ids[1]))
            await until(lambda: len(raw.statuses) + len(second.statuses) >= 24 - 32 // 3)
            assert server.budget.held <= 32 * MIB
            assert server.budget.rejections["total"]
            await assert_served(server)
        await until(lambda: not server.budget.held)


async def test_reply_of_a_write_is_never_rejected_since_the_write_is_committed(
    server: Server, chat: Chat
) -> None:
    session_id = await large_session(chat)
    [stored, *_] = (await chat.page(session_id, page_size=1)).messages
    # Admits calls of a user who holds nearly the limit, as if they had begun earlier.
    server.budget.unchecked_bytes = server.budget.limit
    await until(lambda: not server.budget.held)
    async with RawConnection(server.address) as raw:
        for _ in range(20):
            await raw.call("ListMessages", page_request(chat, session_id))
        fitting = server.settings.max_bytes_per_user // 2_800_000
        await raw.wait_for(20 - fitting)
        # Fills the rest of the user's share, less than one message.
        room = free_bytes(server)
        while room > 200_000:
            await raw.call(
                "GetMessage",
                message_pb2.GetMessageRequest(
                    user_id=chat.user_id, session_id=session_id, message_id=stored.id
                ),
            )
            room -= 200_000
            await until(lambda room=room: free_bytes(server) <= room)  # type: ignore[misc]
        await failures.assert_fails(chat.get(session_id, stored.id), "OVERLOADED")
        updated = await chat.update(session_id, stored.id, token_count=7)
        assert (updated.token_count, len(updated.content)) == (7, 200_000)
    await until(lambda: not server.budget.held)


@pytest.mark.faults
async def test_connection_whose_client_does_not_read_is_closed(
    server: Server, chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the replies that are ready for longer than the limit close a connection."""
    session_id = await large_session(chat)
    server.unread_replies.timeout_s = 0.4
    with capture_logs() as events, caplog.at_level(logging.WARNING):
        async with RawConnection(server.address) as raw, asyncio.timeout(30):
            for _ in range(3):
                await raw.call("ListMessages", page_request(chat, session_id))
            await raw.call("GetSession", message_pb2.ListMessagesRequest())
            await raw.closed.wait()
            await until(lambda: not server.calls.in_flight and not server.budget.held)
            await chat.page(session_id)
    [event] = events
    assert event["event"] == "connection closed because its client does not read replies"
    assert (event["peer"], event["replies"]) == (raw.local_name, 3)
    assert caplog.records == [], "gRPC logs nothing about the calls of the closed connection"


async def test_connections_that_are_not_read_are_closed_together_and_off_the_loop(
    server: Server, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding one connection takes a look at all of them."""
    session_id = await chat.start([new_message("x" * 200_000)])
    passes: list[tuple[int, set[str]]] = []
    close_peers = connections.close_peers

    def record(port: int, peers: Collection[str]) -> None:
        passes.append((threading.get_ident(), set(peers)))
        close_peers(port, peers)

    monkeypatch.setattr(connections, "close_peers", record)
    async with AsyncExitStack() as stack, asyncio.timeout(30):
        raws = [
            await stack.enter_async_context(RawConnection(server.address, window_bytes=1000))
            for _ in range(4)
        ]
        for raw in raws:
            await raw.call("ListMessages", page_request(chat, session_id))
        await until(lambda: server.calls.in_flight == 4)
        await until(lambda: len(server.unread_replies._replies) == 4)
        server.unread_replies.timeout_s = 0
        server.unread_replies._sweep()
        for raw in raws:
            await raw.closed.wait()
        await until(lambda: not server.calls.in_flight)
    # A later pass may see calls that are about to end.
    assert passes[0][1] == {raw.local_name for raw in raws}
    assert threading.get_ident() not in {thread_id for thread_id, _ in passes}


async def test_unread_reply_of_a_stream_is_closed_only_while_other_streams_wait(
    server: Server, chat: Chat
) -> None:
    session_id = await large_session(chat)
    server.unread_replies.timeout_s = 0.2
    request = message_pb2.WatchMessagesRequest(user_id=chat.user_id, session_id=session_id)
    async with RawConnection(server.address) as raw, asyncio.timeout(30):
        await raw.call("WatchMessages", request)
        await until(lambda: server.budget.held > 0)
        for _ in range(5):
            server.unread_replies._sweep()
            await asyncio.sleep(0.1)
        assert not raw.closed.is_set()
        held = server.budget.held
        room = server.budget.limit // 2 - held
        server.budget.add("somebody", "", room)
        waiting = asyncio.create_task(server.budget.reserve("other", "", held))
        await raw.closed.wait()
        await waiting
        server.budget.release("somebody", "", room)
        server.budget.release("other", "", held)


@pytest.mark.parametrize("kind", ["cancelled", "closed"])
async def test_watches_that_end_while_a_write_waits_count_as_cancelled(
    database_url: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving(database_url, metrics_listen="127.0.0.1:0") as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start([new_message("x" * 5_000) for _ in range(20)])
        request = message_pb2.WatchMessagesRequest(user_id=chat.user_id, session_id=session_id)
        with capture_logs() as events, caplog.at_level(logging.WARNING):
            async with RawConnection(server.address) as raw:
                streams = [await raw.call("WatchMessages", request) for _ in range(50)]
                await until(lambda: server.streams.in_flight == 50)
                if kind == "cancelled":
                    for stream in streams:
                        raw.reset(stream)
                    await until(lambda: not server.streams.in_flight)
            await until(lambda: not server.streams.in_flight)
        assert events == []
        assert caplog.records == []
        assert server.metrics is not None
        codes = Counter[str]()
        for family in server.metrics._handled.collect():
            for sample in family.samples:
                labels = sample.labels
                if labels["grpc_method"] == "WatchMessages" and sample.name.endswith("_total"):
                    codes[labels["grpc_code"]] += int(sample.value)
        assert codes == {"CANCELLED": 50}


async def test_calls_of_a_user_close_to_the_limit_are_rejected_before_any_work(
    server: Server, chat: Chat, cluster: Cluster, database_url: str
) -> None:
    session_id = await chat.start()
    await until(lambda: not server.calls.in_flight and server.epoch._task is None)
    n_bytes = server.budget.per_user * 15 // 16
    server.budget.add(chat.user_id, "", n_bytes)
    sent = SentStatements(cluster, database_url)
    await failures.assert_fails(chat.get_session(session_id), "OVERLOADED")
    await failures.assert_fails(chat.append(session_id, "more"), "OVERLOADED")
    assert sent.so_far() == []
    await assert_served(server)
    server.budget.release(chat.user_id, "", n_bytes)
    await chat.append(session_id, "more")


# --- Requests.


@asynccontextmanager
async def locked_session(
    cluster: Cluster, database_url: str, session_id: str
) -> AsyncGenerator[None]:
    """Lock a session, so that appends to it wait."""
    holder = await cluster.connect(database_name(database_url))
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session_id)
            yield
    finally:
        await holder.close()


async def test_large_requests_of_one_user_are_bounded_and_other_users_are_served(
    server: Server, chat: Chat, cluster: Cluster, database_url: str
) -> None:
    session_id = await chat.start()
    await until(lambda: not server.calls.in_flight)
    limit = server.settings.max_bytes_per_user
    async with locked_session(cluster, database_url, session_id):
        appends = [
            asyncio.create_task(
                chat.append(session_id, [new_message("x" * 200_000) for _ in range(19)])
            )
            for _ in range(20)
        ]
        fitting = limit // 3_810_000
        await until(lambda: sum(append.done() for append in appends) == 20 - fitting)
        assert limit - 3_900_000 < server.budget.held <= limit
        for append in appends:
            if append.done():
                await failures.assert_fails(append, "OVERLOADED")
        await assert_served(server)
    accepted = [append for append in appends if not append.done()]
    await asyncio.gather(*accepted)
    assert (await chat.get_session(session_id)).last_seq == 1 + 19 * fitting


async def test_silent_callers_do_not_keep_others_from_sending_requests(
    server: Server, chat: Chat
) -> None:
    """One connection uses half of the permits; its other calls wait until these end."""
    receiver = server.receiver
    request = page_request(chat, await chat.start())
    async with RawConnection(server.address) as raw:
        for _ in range(100):
            raw.start_call("ListMessages")
        half = receiver.permit_count // 2
        await until(lambda: receiver.receiving_count + receiver.waiting_count == 100)
        assert receiver.receiving_count == half
        await assert_served(server)
        async with RawConnection(server.address) as second, asyncio.timeout(30):
            await second.call("ListMessages", request)
            await second.wait_for(0)
            await until(lambda: receiver.receiving_count == half)
        assert raw.statuses == {}
        assert not server.calls.in_flight
    await until(lambda: not receiver.receiving_count and not receiver.waiting_count)


async def test_calls_that_are_cancelled_while_they_wait_leave_their_places(
    server: Server, chat: Chat
) -> None:
    """Permits become free and calls are cancelled in the same turns of the loop."""
    receiver = server.receiver
    with capture_logs() as events:
        async with RawConnection(server.address) as raw:
            for _ in range(3):
                streams = [raw.start_call("ListMessages") for _ in range(100)]
                await until(lambda: receiver.receiving_count + receiver.waiting_count == 100)
                for stream in (*streams[::2], *streams[1::2]):
                    raw.reset(stream)
                await until(lambda: not receiver.receiving_count and not receiver.waiting_count)
    assert events == []
    assert not receiver._queues
    await chat.start()


async def test_request_that_does_not_arrive_ends_at_the_time_limit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "service.server.RequestReceiver",
        lambda **_: RequestReceiver(permit_count=4, timeout_s=0.5),
    )
    async with (
        serving(database_url) as server,
        connected(server.address) as stub,
        RawConnection(server.address, window_bytes=65_535) as raw,
        asyncio.timeout(30),
    ):
        chat = await Chat.of_new_user(stub)
        request = page_request(chat, await chat.start())
        for _ in range(6):
            raw.start_call("ListMessages")
        waiting = await raw.call("ListMessages", request)
        await raw.wait_for(7)
        assert raw.statuses.pop(waiting) == OK
        assert set(raw.statuses.values()) == {DEADLINE_EXCEEDED}
        assert server.receiver.receiving_count == 0


async def test_slow_request_is_rejected_while_a_caller_with_fewer_waits(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "service.server.RequestReceiver",
        lambda **_: RequestReceiver(permit_count=4, timeout_s=1000, contended_timeout_s=0),
    )
    async with (
        serving(database_url) as server,
        RawConnection(server.address) as first,
        RawConnection(server.address) as second,
        RawConnection(server.address) as third,
        RawConnection(server.address) as fourth,
        asyncio.timeout(30),
    ):
        for count, raw in enumerate((first, first, second, third), 1):
            raw.start_call("ListMessages")
            await until(lambda count=count: server.receiver.receiving_count == count)  # type: ignore[misc]
        fourth.start_call("ListMessages")
        await first.wait_for(1)
        assert set(first.statuses.values()) == {RESOURCE_EXHAUSTED}
        assert (second.statuses, third.statuses, fourth.statuses) == ({}, {}, {})


async def test_call_that_waits_to_send_may_send_only_one_window(server: Server) -> None:
    receiver = server.receiver
    async with RawConnection(server.address) as raw:
        for _ in range(receiver.permit_count):
            raw.start_call("ListMessages")
        await until(lambda: receiver.waiting_count > 0)
        stream = raw.start_call("AppendMessages")
        sending = asyncio.create_task(raw.send(stream, bytes(4 * WINDOW_BYTES)))
        await until(lambda: raw.window(stream) == 0)
        await assert_served(server)
        assert raw.window(stream) == 0
        assert raw.sent[stream] == WINDOW_BYTES
        sending.cancel()
        await asyncio.wait([sending])


async def test_call_without_a_request_is_malformed(server: Server) -> None:
    async with RawConnection(server.address) as raw, asyncio.timeout(30):
        streams = [raw.start_call(name) for name in ("AppendMessages", "WatchMessages")]
        for stream in streams:
            raw.end(stream)
        await raw.wait_for(2)
        assert raw.statuses == dict.fromkeys(streams, INVALID_ARGUMENT)


async def test_second_request_of_a_unary_call_is_ignored(server: Server, chat: Chat) -> None:
    request = page_request(chat, await chat.start())
    async with RawConnection(server.address, window_bytes=65_535) as raw, asyncio.timeout(30):
        stream = raw.start_call("ListMessages")
        await raw.send(stream, raw.frame(request) * 2)
        raw.end(stream)
        await raw.wait_for(1)
        assert raw.statuses == {stream: OK}


@pytest.mark.parametrize("method", ["WatchMessages", "ExportUserData"])
async def test_large_request_of_a_stream_is_rejected(
    server: Server, chat: Chat, method: str
) -> None:
    """The request is kept while the stream is open, and unknown fields can make it large."""
    session_id = await chat.start()
    request = message_pb2.WatchMessagesRequest(user_id=chat.user_id, session_id=session_id)
    unknown_field = b"\xfa\x3f\x80\x80\x04" + bytes(64 * 1024)
    data = request.SerializeToString() + unknown_field
    async with channel(server.address) as opened:
        untyped: Any = opened
        call = untyped.unary_stream(f"/{SERVICE}/{method}")(data)
        await failures.assert_fails(call.read(), "REQUEST_TOO_LARGE")
