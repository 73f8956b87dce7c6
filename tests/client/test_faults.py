"""Retries, deadlines and resumption, with a proxy between the client and a real server that cuts, delays and black-holes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from chathistory_client import ChatHistoryClient, DeadlineExceeded, NotFound, Unavailable, message
from service.server import Server
from tests.conftest import StartProcess
from tests.support.clients import client_of
from tests.support.proxy import Proxy, Way

pytestmark = pytest.mark.faults  # Takes long.

PATIENCE = 30.0
"""Seconds to wait for what must come."""


@pytest.fixture
async def proxy(server: Server) -> AsyncGenerator[Proxy]:
    """Give a proxy before the server."""
    async with Proxy(server.address) as started:
        yield started


@pytest.fixture
async def through(proxy: Proxy) -> AsyncGenerator[ChatHistoryClient]:
    """Give a client whose connection passes through the proxy."""
    async with client_of(proxy.address) as opened:
        yield opened


@pytest.mark.parametrize("size", [10, 240_000], ids=["small", "large"])
async def test_a_reply_that_is_lost_is_asked_for_again_and_nothing_is_stored_twice(
    client: ChatHistoryClient, through: ChatHistoryClient, proxy: Proxy, owner: str, size: int
) -> None:
    session = await through.create_session(user_id=owner)
    said = [message("user", str(n) * size) for n in range(4)]
    proxy.hold(Way.DOWN)
    appending = asyncio.create_task(
        through.append_messages(user_id=owner, session_id=session.id, messages=said)
    )
    await stored(client, owner, session.id, 4)
    proxy.cut()
    proxy.let_pass()

    reply = await appending

    assert [(each.id, each.seq, each.replayed) for each in reply.messages] == [
        (each.id, n, True) for n, each in enumerate(said, 1)
    ]
    await stored(client, owner, session.id, 4)


async def test_a_session_that_is_started_by_a_lost_call_is_started_once(
    client: ChatHistoryClient, through: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await through.get_user(user_id=owner)
    proxy.hold(Way.DOWN)
    appending = asyncio.create_task(
        through.append_messages(user_id=owner, messages=[message("user", "hello")])
    )
    async with asyncio.timeout(PATIENCE):
        while not [each async for each in client.list_sessions(user_id=owner)]:
            await asyncio.sleep(0.02)
    proxy.cut()
    proxy.let_pass()

    reply = await appending

    assert [each.id async for each in client.list_sessions(user_id=owner)] == [reply.session_id]


async def test_creating_with_ids_of_the_clients_own_survives_a_lost_reply(
    client: ChatHistoryClient, through: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await through.get_user(user_id=owner)
    proxy.hold(Way.DOWN)
    creating = asyncio.create_task(through.create_session(user_id=owner, title="once"))
    async with asyncio.timeout(PATIENCE):
        while not [each async for each in client.list_sessions(user_id=owner)]:
            await asyncio.sleep(0.02)
    proxy.cut()
    proxy.let_pass()

    session = await creating

    assert [each.id async for each in client.list_sessions(user_id=owner)] == [session.id]


async def test_a_black_hole_ends_at_the_deadline(
    through: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    await through.get_user(user_id=owner)
    proxy.hold()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await through.get_user(user_id=owner, timeout=0.5)

    assert 0.4 < time.monotonic() - started < 8
    assert caught.value.reason == ""
    proxy.let_pass()
    assert (await through.get_user(user_id=owner)).id == owner


async def test_a_slow_way_is_no_error(through: ChatHistoryClient, proxy: Proxy, owner: str) -> None:
    proxy.delay = 0.2
    assert (await through.get_user(user_id=owner)).id == owner


async def test_the_client_waits_for_a_server_that_is_away(
    through: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    proxy.refuse()
    asyncio.get_running_loop().call_later(1.0, proxy.accept)
    assert (await through.get_user(user_id=owner)).id == owner


async def test_the_client_fails_at_once_where_that_is_wanted(proxy: Proxy, owner: str) -> None:
    proxy.refuse()
    async with client_of(proxy.address, wait_for_ready=False) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await client.get_user(user_id=owner)
        assert time.monotonic() - started < 8


async def test_a_watch_goes_on_after_every_break(
    client: ChatHistoryClient, through: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    session = await client.create_session(user_id=owner)
    seen: list[int] = []

    watching = asyncio.create_task(watch(through, owner, session.id, seen))
    for breaking in range(4):
        await client.append_messages(
            user_id=owner,
            session_id=session.id,
            messages=[message("user", str(n)) for n in range(3)],
        )
        await reaches(seen, 3 * (breaking + 1))
        proxy.cut()
    proxy.refuse()
    await client.append_messages(
        user_id=owner, session_id=session.id, messages=[message("user", "meanwhile")]
    )
    await asyncio.sleep(0.3)
    assert not watching.done()
    proxy.accept()
    await reaches(seen, 13)

    assert seen == list(range(1, 14))
    await client.delete_session(user_id=owner, session_id=session.id)
    with pytest.raises(NotFound):
        await watching


async def test_a_watch_in_a_black_hole_notices_by_keepalive(
    client: ChatHistoryClient, proxy: Proxy, owner: str
) -> None:
    session = await client.create_session(user_id=owner)
    quick: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.http2.ping_timeout_ms", 500),
    ]
    seen: list[int] = []
    async with client_of(proxy.address, options=quick) as watcher:
        watching = asyncio.create_task(watch(watcher, owner, session.id, seen))
        await client.append_messages(
            user_id=owner, session_id=session.id, messages=[message("user", "1")]
        )
        await reaches(seen, 1)
        # From now on nothing passes on the old connection, for good; a new one is fine.
        dead = set(proxy.links)
        proxy.tap = lambda link, _way, _piece: link not in dead
        await client.append_messages(
            user_id=owner, session_id=session.id, messages=[message("user", "2")]
        )
        await reaches(seen, 2)
        watching.cancel()
        await asyncio.wait([watching])
    proxy.cut()

    assert seen == [1, 2]


async def test_a_watch_survives_restarts_of_the_server(start_process: StartProcess) -> None:
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
        await reaches(seen, 6)
        await second.stop()  # In good order: DRAINING.
        proxy.upstream = (await start_process()).address
        await append(3)
        await reaches(seen, 9)
        watching.cancel()
        await asyncio.wait([watching])

    assert seen == list(range(1, 10))


async def test_replicas_behind_one_name_share_the_calls_and_one_may_go(
    start_process: StartProcess,
) -> None:
    one, two = await start_process(), await start_process()
    async with (
        Proxy(one.address) as first,
        Proxy(two.address) as second,
        # What DNS gives as the addresses of one name.
        client_of(f"ipv4:{first.address},{second.address}") as client,
    ):
        owner = (await client.create_user()).id

        def passed() -> list[int]:
            return [
                sum(sum(link.passed.values()) for link in each.links) for each in (first, second)
            ]

        # One connection may stand before the other; from then on they take turns.
        async with asyncio.timeout(PATIENCE):
            while min(passed()) < 1000:
                await client.get_user(user_id=owner)
        before = passed()
        for _ in range(20):
            await client.get_user(user_id=owner)
        shares = [now - then for now, then in zip(passed(), before, strict=True)]
        assert min(shares) > 0.3 * max(shares)
        await one.kill()
        first.refuse()
        for _ in range(20):
            await client.get_user(user_id=owner, timeout=10)


async def watch(client: ChatHistoryClient, owner: str, session_id: str, seen: list[int]) -> None:
    """Follow a session and note what comes."""
    async for each in client.watch_messages(user_id=owner, session_id=session_id):
        seen.append(each.seq)  # noqa: PERF401 - others read it meanwhile


async def stored(client: ChatHistoryClient, owner: str, session_id: str, count: int) -> None:
    """Wait until a session has so many messages."""
    async with asyncio.timeout(PATIENCE):
        while (
            await client.get_session(user_id=owner, session_id=session_id)
        ).message_count != count:
            await asyncio.sleep(0.02)


async def reaches(seen: list[int], count: int, seconds: float = PATIENCE) -> None:
    """Wait until so many have been seen."""
    async with asyncio.timeout(seconds):
        while len(seen) < count:
            await asyncio.sleep(0.02)
