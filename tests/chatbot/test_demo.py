"""`make demo` over HTTP, without a browser."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from service.embedded.data_dir import Postmaster
from tests.support.chatbots import Browser
from tests.support.demo import running_demo
from tests.support.ports import free_port


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"]
)
async def test_demo_recovers_without_a_restart_when_postgres_ends(
    folder: Path, signal_number: signal.Signals
) -> None:
    data = folder / "data"
    async with (
        running_demo(data, (free_port(), free_port())) as address,
        Browser(address) as browser,
    ):

        async def wait_for_health(status_code: int, timeout_s: float) -> None:
            async with asyncio.timeout(timeout_s):
                while (await browser.get("/db-health")).status_code != status_code:
                    await asyncio.sleep(0.1)

        first = await browser.ask("Is a message ever stored twice?")
        assert (first["saved"], bool(first["sources"])) == (True, True)
        session = first["session_uuid"]
        await wait_for_health(200, 30)
        server = Postmaster.read(data / "postgres")
        assert server is not None
        os.kill(server.pid, signal_number)
        # Two seconds are promised, but the machine may be busy. After ten PostgreSQL is restarted.
        await wait_for_health(503, 7)
        unsaved = await browser.ask("Are you there?", session_uuid=session)
        assert (unsaved["saved"], bool(unsaved["answer"])) == (False, True)
        await wait_for_health(200, 60)
        last = await browser.ask("And now?", session_uuid=session)
        assert last["saved"] is True
        messages = await browser.read(session)
        questions = [message["content"] for message in messages if message["role"] == "user"]
        assert questions == ["Is a message ever stored twice?", "And now?"]
