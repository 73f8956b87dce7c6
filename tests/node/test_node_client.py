"""A client in another language, made of nothing but the published descriptors: tests/node/client.mjs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.server import Server
from tests.support.commands import PATIENCE
from tests.support.servers import ROOT
from tests.support.tools import require

HERE = ROOT / "tests" / "node"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the client's two packages into a folder of the test's own."""
    npm = require("npm")
    require("node")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "client.mjs"


async def run(client: Path, address: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        require("node"), str(client), address, str(ROOT / "generated" / "chathistory.binpb"),
        cwd=client.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.network
@pytest.mark.timeout(600)
async def test_a_node_client_creates_appends_follows_and_lists(
    client: Path, server: Server
) -> None:
    got = await run(client, server.address)
    assert got["user"]["metadata"] == {
        "fields": [{"key": "lang", "value": {"string_value": "js", "kind": "string_value"}}]
    }
    assert got["session"]["title"] == "from Node"
    assert [(each["seq"], each["replayed"]) for each in got["appended"]["messages"]] == [
        (1, False),
        (2, False),
    ]
    assert [(each["seq"], each["replayed"]) for each in got["again"]["messages"]] == [
        (1, True),
        (2, True),
    ]
    assert [each["content"] for each in got["messages"]] == ["Grüße, 世界 🌍", ""]
    assert got["messages"][1]["parts"][0]["tool_call"] == {
        "id": "call-1", "name": "weather", "arguments": '{"city": "Berlin"}',
    }  # fmt: skip
    assert got["followed"] == got["messages"]
    assert [each["seq"] for each in got["context"]["messages"]] == [1, 2]
    assert got["refused"] == {"code": 5, "details": "session not found", "status": 1}
