"""The chatbot while the database, or the whole service, is away; and turns during which the service is killed."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest

from tests.conftest import StartProcess
from tests.support.chatbots import Browser, Model, chatting
from tests.support.clients import client_of
from tests.support.ports import NOBODY
from tests.support.proxy import Proxy, before_postgres
from tests.support.servers import serving

pytestmark = pytest.mark.faults  # Takes long.

TURNS = 200
USERS = 20


@pytest.mark.parametrize("black_hole", [False, True], ids=["stopped", "black hole"])
async def test_the_chat_goes_on_without_the_database_and_says_so(
    database_url: str, black_hole: bool
) -> None:
    async with (
        before_postgres(database_url) as (proxy, url),
        serving(url, db_connect_timeout=2.0) as server,
        chatting(server.address) as address,
        Browser(address) as browser,
    ):
        before = await browser.ask("Before")
        assert (await browser.get("/db-health")).status_code == 200

        (proxy.hold if black_hole else proxy.refuse)()
        await asyncio.sleep(1.1)  # An answer about the database is shared for one second.
        started = time.monotonic()
        health = await browser.get("/db-health")
        assert (
            time.monotonic() - started < 8
        )  # Two seconds are promised; the machine may have others.
        assert (health.status_code, health.json()["status"]) == (503, "unavailable")

        started = time.monotonic()
        known = await browser.ask("Meanwhile", session_uuid=before["session_uuid"])
        fresh = await browser.ask("Meanwhile, too")
        assert time.monotonic() - started < 30
        assert (known["saved"], fresh["saved"], fresh["session_uuid"]) == (False, False, None)
        assert known["answer"]
        listed = await browser.get("/api/sessions")
        assert (listed.status_code, listed.headers["retry-after"]) == (503, "2")
        assert listed.json()["reason"]

        if black_hole:
            proxy.let_pass()
        proxy.accept()
        async with asyncio.timeout(20):
            while (await browser.get("/db-health")).status_code != 200:
                await asyncio.sleep(0.2)
        after = await browser.ask("After", session_uuid=before["session_uuid"])
        assert after["saved"]
        said = [
            each["content"]
            for each in await browser.read(before["session_uuid"])
            if each["role"] == "user"
        ]
        assert said[0] == "Before"
        assert said[-1] == "After"


async def test_nothing_hangs_while_the_service_is_away() -> None:
    async with chatting(NOBODY) as address, Browser(address) as browser:
        started = time.monotonic()
        health = await browser.get("/db-health")
        assert (health.status_code, health.json()["database"]) == (503, "unreachable")
        assert (
            time.monotonic() - started < 8
        )  # Two seconds are promised; the machine may have others.
        reply = await browser.ask("Hello?")
        assert (reply["saved"], reply["session_uuid"]) == (False, None)
        assert "cannot be searched" in reply["answer"]
        assert (await browser.get("/api/sessions")).status_code == 503
        assert time.monotonic() - started < 30


async def test_where_history_is_required_nothing_is_answered_without_it() -> None:
    async with (
        chatting(NOBODY, require_history=True, history_timeout=0.3) as address,
        Browser(address) as browser,
    ):
        for path in ("/chat", "/chat/stream"):
            reply = await browser.post(path, json={"message": "Hello?"})
            assert reply.status_code == 503
            assert reply.headers["retry-after"]


async def test_a_turn_outlasts_a_break_shorter_than_itself(database_url: str, model: Model) -> None:
    model.words, model.pause = ["One ", "two ", "three"], 1.0
    async with (
        serving(database_url) as server,
        Proxy(server.address) as proxy,
        model.serving() as settings,
        chatting(proxy.address, history_timeout=0.5, **settings) as address,
        Browser(address) as browser,
    ):
        proxy.refuse()
        asking = asyncio.create_task(browser.ask("Hello?"))
        await asyncio.sleep(0.8)
        proxy.accept()
        reply = await asking
        assert reply["saved"]
        assert [each["content"] for each in await browser.read(reply["session_uuid"])] == [
            "Hello?",
            "One two three",
        ]


@pytest.mark.timeout(120)
async def test_every_turn_that_was_saved_is_stored_once_though_the_service_is_killed(
    start_process: StartProcess, model: Model
) -> None:
    saved: list[dict[str, Any]] = []
    lost = 0
    process = await start_process()
    async with Proxy(process.address) as proxy, model.serving() as settings:
        async with chatting(proxy.address, history_timeout=5, **settings) as address:

            async def user(number: int) -> None:
                nonlocal lost
                session = None
                async with Browser(address) as browser:
                    for turn in range(TURNS // USERS):
                        message_id = str(uuid.uuid4())
                        said = f"user {number} turn {turn}"
                        reply = await browser.ask(said, message_id=message_id, session_uuid=session)
                        session = session or reply["session_uuid"]
                        if reply["saved"]:
                            saved.append(reply | {"said": said})
                        else:
                            lost += 1

            async with asyncio.TaskGroup() as users:
                for number in range(USERS):
                    users.create_task(user(number))
                while len(saved) < TURNS // 4:
                    await asyncio.sleep(0.01)
                await process.kill()
                proxy.refuse()
                process = await start_process()
                proxy.upstream = process.address
                proxy.accept()

        stored: dict[str, list[tuple[str, str]]] = {}
        async with client_of(process.address) as client:
            async for owner in client.list_users():
                async for session in client.list_sessions(user_id=owner.id):
                    async for each in client.list_messages(user_id=owner.id, session_id=session.id):
                        stored.setdefault(each.id, []).append((session.id, each.content))

    print(f"{len(saved)} turns were saved, {lost} were answered without")
    assert len(saved) + lost == TURNS
    assert len(saved) >= TURNS / 2  # How many are lost depends on how long a start takes.
    for turn in saved:
        assert stored[turn["message_id"]] == [(turn["session_uuid"], turn["said"])]
        assert stored[turn["answer_id"]] == [(turn["session_uuid"], turn["answer"])]
