"""The demo as somebody without a browser meets it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from service.store.data_folder import Postmaster
from tests.support.chatbots import Browser
from tests.support.demo import demo
from tests.support.ports import free_port


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["stopped", "killed"])
async def test_postgres_goes_and_comes_back_without_a_restart(
    folder: Path, number: signal.Signals
) -> None:
    data = folder / "data"
    async with (
        demo(data, (free_port(), free_port())) as address,
        Browser(address) as browser,
    ):

        async def health(wanted: int, within: float) -> None:
            async with asyncio.timeout(within):
                while (await browser.get("/db-health")).status_code != wanted:
                    await asyncio.sleep(0.1)

        first = await browser.ask("Is a message ever stored twice?")
        assert (first["saved"], bool(first["sources"])) == (True, True)
        session = first["session_uuid"]
        await health(200, 30)
        server = Postmaster.read(data / "postgres")
        assert server is not None
        os.kill(server.pid, number)
        await health(
            503, 7
        )  # Two seconds are promised; the machine may be busy. After ten it is there again.
        meanwhile = await browser.ask("Are you there?", session_uuid=session)
        assert (meanwhile["saved"], bool(meanwhile["answer"])) == (False, True)
        await health(200, 60)
        again = await browser.ask("And now?", session_uuid=session)
        assert again["saved"] is True
        said = [each["content"] for each in await browser.read(session) if each["role"] == "user"]
        assert said == ["Is a message ever stored twice?", "And now?"]
