"""Retries, deadlines and resumption, through a proxy that cuts, delays and black-holes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from chathistory_client import (
    ChatHistoryClient,
    DeadlineExceeded,
    NotFound,
    OutOfRange,
    Unavailable,
    message,
)
from service.server import Server
from tests.conftest import StartProcess
from tests.support.clients import client_of
from tests.support.lost_history import lose_messages
from tests.support.proxy import Direction, Proxy

pytestmark = pytest.mark.faults

TIMEOUT_S = 30.0


@pytest.fixture
async def proxy(server: Server) -> AsyncGenerator[Proxy]:
    """A proxy in front of the server."""
    async with Proxy(server.address) as started:
        yield started


@pytest.fixture
async def proxied(proxy: Proxy) -> AsyncGenerator[ChatHistoryClient]:
    """A client whose connections pass through the proxy."""
    async with client_of(proxy.address) as opened:
        yield opened


# A request beyond 64 KiB would wait for the server's window, which the proxy holds back, too.
@pytest.mark.parametrize("size", [10, 14_000], ids=["small", "large"])
async def test_append_with_a_lost_reply_is_retried_and_stored_once(
    client: ChatHistoryClient, proxied: ChatHistoryClient, proxy: Proxy, owner: str, size: int
) -> None:
    session = await proxied.create_session(user_id=owner)
    messages = [message("user", str(n) * size) for n in range(4)]
    proxy.block(Direction.TO_CLIENT)
    appending = asyncio.create_task(
        proxied.append_messages(user_id=owner, session_id=session.id, messages=messages)
    )
    await wait_for_stored(client, owner, session.id, 4)
    proxy.reset_connections()
    proxy.unblock()

    reply = await appending

    assert [(entry.id, entry.seq, entry.replayed) for entry in reply.messages] == [
        (sent.id, seq, True) for seq, sent in enumerate(messages, 1)
    ]
    await wait_for_stored(client, owner, session.id, 4)


async def test_append_that_creates_a_session_with_a_lost_reply_creates_it_once(
    client: ChatHistoryClient, proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await proxied.get_user(user_id=owner)
    proxy.block(Direction.TO_CLIENT)
    appending = asyncio.create_task(
        proxied.append_messages(user_id=owner, messages=[message("user", "hello")])
    )
    async with asyncio.timeout(TIMEOUT_S):
        while not [item async for item in client.list_sessions(user_id=owner)]:
            await asyncio.sleep(0.02)
    proxy.reset_connections()
    proxy.unblock()

    reply = await appending

    assert [item.id async for item in client.list_sessions(user_id=owner)] == [reply.session_id]


async def test_create_session_with_a_lost_reply_creates_it_once(
    client: ChatHistoryClient, proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await proxied.get_user(user_id=owner)
    proxy.block(Direction.TO_CLIENT)
    creating = asyncio.create_task(proxied.create_session(user_id=owner, title="once"))
    async with asyncio.timeout(TIMEOUT_S):
        while not [item async for item in client.list_sessions(user_id=owner)]:
            await asyncio.sleep(0.02)
    proxy.reset_connections()
    proxy.unblock()

    session = await creating

    assert [item.id async for item in client.list_sessions(user_id=owner)] == [session.id]


async def test_black_holed_call_raises_deadline_exceeded_on_time(
    proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await proxied.get_user(user_id=owner)
    proxy.block()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await proxied.get_user(user_id=owner, timeout=0.5)

    assert 0.4 < time.monotonic() - started < 8
    assert caught.value.reason == ""
    proxy.unblock()
    assert (await proxied.get_user(user_id=owner)).id == owner


async def test_call_over_a_slow_connection_succeeds(
    proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    proxy.delay = 0.2
    assert (await proxied.get_user(user_id=owner)).id == owner


async def test_call_waits_until_the_server_accepts_connections(
    proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    proxy.refuse_connections()
    asyncio.get_running_loop().call_later(1.0, proxy.accept_connections)
    assert (await proxied.get_user(user_id=owner)).id == owner


async def test_call_without_wait_for_ready_fails_before_its_deadline(
    proxy: Proxy, owner: str
) -> None:
    proxy.refuse_connections()
    async with client_of(proxy.address, wait_for_ready=False) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await client.get_user(user_id=owner)
        assert time.monotonic() - started < 8


async def test_watch_resumes_after_each_lost_connection(
    client: ChatHistoryClient, proxied: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    session = await client.create_session(user_id=owner)
    seen: list[int] = []

    watching = asyncio.create_task(watch(proxied, owner, session.id, seen))
    for cut_count in range(4):
        await client.append_messages(
            user_id=owner,
            session_id=session.id,
            messages=[message("user", str(n)) for n in range(3)],
        )
        await wait_for_seen(seen, 3 * (cut_count + 1))
        proxy.reset_connections()
    proxy.refuse_connections()
    await client.append_messages(
        user_id=owner, session_id=session.id, messages=[message("user", "while refused")]
    )
    await asyncio.sleep(0.3)
    assert not watching.done()
    proxy.accept_connections()
    await wait_for_seen(seen, 13)

    assert seen == list(range(1, 14))
    await client.delete_session(user_id=owner, session_id=session.id)
    with pytest.raises(NotFound):
        await watching


async def test_watch_in_a_black_hole_resumes_by_keepalive(
    client: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    session = await client.create_session(user_id=owner)
    keepalive: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.http2.ping_timeout_ms", 500),
    ]
    seen: list[int] = []
    async with client_of(proxy.address, options=keepalive) as watcher:
        watching = asyncio.create_task(watch(watcher, owner, session.id, seen))
        await client.append_messages(
            user_id=owner, session_id=session.id, messages=[message("user", "1")]
        )
        await wait_for_seen(seen, 1)
        # The connections that exist now are black-holed for good. New ones work.
        black_holed = set(proxy.links)
        proxy.tap = lambda link, _way, _piece: link not in black_holed
        await client.append_messages(
            user_id=owner, session_id=session.id, messages=[message("user", "2")]
        )
        await wait_for_seen(seen, 2)
        watching.cancel()
        await asyncio.wait([watching])
    proxy.reset_connections()

    assert seen == [1, 2]


async def test_watch_resumes_after_a_crash_and_after_a_drain_of_the_server(
    start_process: StartProcess,
) -> None:
    first = await start_process()
    async with Proxy(first.address) as proxy, client_of(proxy.address) as client:
        owner = (await client.create_user()).id
        session = await client.create_session(user_id=owner)
        seen: list[int] = []

        async def append(count: int) -> None:
            for _ in range(count):
                await client.append_messages(
                    user_id=owner, session_id=session.id, messages=[message("user", "x")]
                )

        watching = asyncio.create_task(watch(client, owner, session.id, seen))
        await append(3)
        await first.kill()
        second = await start_process()
        proxy.upstream = second.address
        await append(3)
        await wait_for_seen(seen, 6)
        await second.stop()  # An orderly stop: the stream ends with DRAINING.
        proxy.upstream = (await start_process()).address
        await append(3)
        await wait_for_seen(seen, 9)
        watching.cancel()
        await asyncio.wait([watching])

    assert seen == list(range(1, 10))


@pytest.mark.case(n=517)
async def test_resumed_watch_reports_messages_that_a_failover_lost(
    client: ChatHistoryClient,
    proxied: ChatHistoryClient,
    proxy: Proxy,
    owner: str,
    database_url: str,
) -> None:
    """The stream breaks in the failover, and others take the lost seqs before it is resumed."""
    session = await client.create_session(user_id=owner)

    async def append(count: int) -> None:
        for _ in range(count):
            await client.append_messages(
                user_id=owner, session_id=session.id, messages=[message("user", "x")]
            )

    await append(6)
    seen: list[int] = []
    watching = asyncio.create_task(watch(proxied, owner, session.id, seen))
    await wait_for_seen(seen, 6)
    proxy.refuse_connections()
    proxy.reset_connections()
    await lose_messages(database_url, session.id, after_seq=4)
    await append(3)
    proxy.accept_connections()

    with pytest.raises(OutOfRange) as caught:
        async with asyncio.timeout(TIMEOUT_S):
            await watching

    assert caught.value.reason == "HISTORY_RESTORED"
    assert caught.value.metadata == {"session_id": session.id, "last_seq": "7"}
    assert seen == [1, 2, 3, 4, 5, 6]


async def test_replicas_of_one_target_share_calls_and_calls_survive_the_loss_of_one(
    start_process: StartProcess,
) -> None:
    replicas = [await start_process() for _ in range(2)]
    async with (
        Proxy(replicas[0].address) as first,
        Proxy(replicas[1].address) as second,
        # Equivalent to a DNS name with two addresses.
        client_of(f"ipv4:{first.address},{second.address}") as client,
    ):
        owner = (await client.create_user()).id

        def transferred() -> list[int]:
            """Return the bytes that passed each proxy."""
            return [
                sum(sum(link.passed.values()) for link in proxy.links) for proxy in (first, second)
            ]

        # One connection may be ready before the other. Round robin needs both.
        async with asyncio.timeout(TIMEOUT_S):
            while min(transferred()) < 1000:
                await client.get_user(user_id=owner)
        before = transferred()
        for _ in range(20):
            await client.get_user(user_id=owner)
        shares = [now - then for now, then in zip(transferred(), before, strict=True)]
        assert min(shares) > 0.3 * max(shares)
        await replicas[0].kill()
        first.refuse_connections()
        for _ in range(20):
            await client.get_user(user_id=owner, timeout=10)


async def watch(client: ChatHistoryClient, owner: str, session_id: str, seen: list[int]) -> None:
    """Watch a session and record the `seq` of each message."""
    async for item in client.watch_messages(user_id=owner, session_id=session_id):
        seen.append(item.seq)  # noqa: PERF401 - the test reads it concurrently


async def wait_for_stored(
    client: ChatHistoryClient, owner: str, session_id: str, count: int
) -> None:
    """Wait until the session has `count` messages."""
    async with asyncio.timeout(TIMEOUT_S):
        while (
            await client.get_session(user_id=owner, session_id=session_id)
        ).message_count != count:
            await asyncio.sleep(0.02)


async def wait_for_seen(seen: list[int], count: int) -> None:
    """Wait until `count` messages were received."""
    async with asyncio.timeout(TIMEOUT_S):
        while len(seen) < count:
            await asyncio.sleep(0.02)
