"""examples/quickstart.py shows the client at work, and can be run again."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

from service.server import Server
from tests.support.servers import ROOT

QUICKSTART = ROOT / "examples" / "quickstart.py"


async def run(address: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", str(QUICKSTART), address,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode().splitlines()


async def test_the_quickstart_prints_the_conversation(server: Server) -> None:
    first, *rest = await run(server.address)
    assert re.fullmatch(r"user      Ada, [0-9a-f-]{36}", first)
    assert rest == [
        "question  stored as seq 1 of a new session",
        "context   1 message, 4 tokens",
        "answer    seq 2, replayed: False",
        "retry     seq 2, replayed: True",
        "listed    1. What is a heron?",
        "listed    2. A long-legged bird that wades in shallow water.",
        "watched   2. A long-legged bird that wades in shallow water.",
    ]


async def test_a_second_run_of_the_quickstart_finds_the_same_user(server: Server) -> None:
    assert await run(server.address) == await run(server.address)


def test_the_quickstart_has_sixty_lines() -> None:
    assert len(QUICKSTART.read_text().splitlines()) <= 65
