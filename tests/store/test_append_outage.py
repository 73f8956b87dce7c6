"""The database refuses connections: appends wait, and their lanes back off."""

from __future__ import annotations

import asyncio

import pytest

from service.store.append.appender import Appender
from service.store.append.request import Append
from service.store.db import retries
from tests.support.appends import new_message, new_user, stores
from tests.support.chat import new_id
from tests.support.proxy import postgres_proxy

pytestmark = pytest.mark.faults  # Outages take seconds.

OUTAGE_S = 4.0
LANES = 2


async def test_lanes_back_off_during_an_outage_and_resume_after_it(database_url: str) -> None:
    user_id = await new_user(database_url)
    async with postgres_proxy(database_url) as (proxy, url), stores(url) as [database]:
        appender = Appender(database, LANES)
        loop = asyncio.get_running_loop()

        def begin() -> asyncio.Future[object]:
            item = Append(
                user_id, new_id(), [new_message(new_id())], loop.time() + 14, may_create=True
            )
            return asyncio.ensure_future(appender.append(item))

        await begin()
        proxy.refuse_connections()
        waiting = []
        before = proxy.accepted
        for _ in range(20):
            waiting.append(begin())
            await asyncio.sleep(OUTAGE_S / 20)
        attempts = proxy.accepted - before
        assert not any(task.done() for task in waiting)
        # Full jitter up to a second gives about 13 attempts a lane; without back-off it was 200.
        assert LANES <= attempts < 30 * LANES, attempts
        proxy.accept_connections()
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        await appender.drain()


async def test_append_times_out_while_its_lane_backs_off(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each append fails before its deadline, however long the lane backs off."""
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 1.0)
    user_id = await new_user(database_url)
    async with postgres_proxy(database_url) as (proxy, url), stores(url) as [database]:
        appender = Appender(database, 1)
        loop = asyncio.get_running_loop()
        proxy.refuse_connections()
        deadlines = [loop.time() + 4 + n / 10 for n in range(20)]
        items = [
            Append(user_id, new_id(), [new_message(new_id())], deadline, may_create=True)
            for deadline in deadlines
        ]
        answered: list[float] = []

        async def append(item: Append) -> None:
            answer = await asyncio.gather(appender.append(item), return_exceptions=True)
            answered.append(loop.time())
            assert getattr(answer[0], "reason", "") == "DATABASE_UNAVAILABLE"

        await asyncio.gather(*map(append, items))
        assert all(at < deadline for at, deadline in zip(answered, deadlines, strict=True))
        await appender.drain()
