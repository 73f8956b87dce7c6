"""`chat-history reindex`, run as a command."""

from __future__ import annotations

import asyncio
import sys

from service.search.service import Search
from service.server import Server
from tests.search.library import Library
from tests.search.waits import wait_until_indexed
from tests.support.servers import ROOT


async def run_reindex(*arguments: str) -> tuple[int, str]:
    """Run the command; return its exit code and its output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "reindex", *arguments),
        cwd=ROOT / "tests",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_reindex_returns_when_the_new_index_is_live(server: Server, library: Library) -> None:
    document = await library.create(["The lighthouse was built in 1901."])
    await wait_until_indexed(server)
    assert isinstance(server.search, Search)
    assert server.search._index is not None
    before = await server.search._index.live_collection()
    code, output = await run_reindex("--address", server.address)
    assert (code, "was rebuilt" in output) == (0, True), output
    assert await server.search._index.live_collection() != before
    hits = await library.search("an old tower that shows ships the way")
    assert hits[0].document.id == document.id


async def test_reindex_without_a_server_prints_the_error() -> None:
    code, output = await run_reindex("--address", "127.0.0.1:1")
    assert code == 1
    assert "UNAVAILABLE" in output
    assert "Traceback" not in output
