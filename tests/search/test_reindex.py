"""`chat-history reindex`, as an operator runs it."""

from __future__ import annotations

import asyncio
import sys

from service.search.service import Search
from service.server import Server
from tests.search.library import Library
from tests.search.waits import wait_until_indexed
from tests.support.servers import ROOT


async def run(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "reindex", *arguments),
        cwd=ROOT / "tests",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_the_command_waits_until_the_index_is_built(server: Server, library: Library) -> None:
    made = await library.create(["The lighthouse was built in 1901."])
    await wait_until_indexed(server)
    assert isinstance(server.search, Search)
    assert server.search._index is not None
    before = await server.search._index.live_collection()
    code, output = await run("--address", server.address)
    assert (code, "was rebuilt" in output) == (0, True), output
    assert await server.search._index.live_collection() != before
    assert (await library.search("an old tower that shows ships the way"))[0].document.id == made.id


async def test_it_says_what_is_wrong() -> None:
    code, output = await run("--address", "127.0.0.1:1")
    assert code == 1
    assert "UNAVAILABLE" in output
    assert "Traceback" not in output
