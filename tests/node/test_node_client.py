"""A Node client that is built from the published descriptor set only: tests/node/client.mjs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.server import Server
from tests.support.commands import TIMEOUT_S
from tests.support.servers import ROOT
from tests.support.tools import require_program

HERE = ROOT / "tests" / "node"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the client with its two dependencies into a temporary folder."""
    npm = require_program("npm")
    require_program("node")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "client.mjs"):
        shutil.copy(HERE / name, folder)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder / "client.mjs"


async def run(client: Path, address: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        require_program("node"),
        str(client),
        address,
        str(ROOT / "generated" / "chathistory.binpb"),
        cwd=client.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    output: dict[str, Any] = json.loads(out)
    return output


@pytest.mark.network
@pytest.mark.timeout(600)
async def test_node_client_creates_appends_watches_and_lists(client: Path, server: Server) -> None:
    output = await run(client, server.address)
    assert output["user"]["metadata"] == {
        "fields": [{"key": "lang", "value": {"string_value": "js", "kind": "string_value"}}]
    }
    assert output["session"]["title"] == "from Node"
    assert [(entry["seq"], entry["replayed"]) for entry in output["appended"]["messages"]] == [
        (1, False),
        (2, False),
    ]
    assert [(entry["seq"], entry["replayed"]) for entry in output["repeated"]["messages"]] == [
        (1, True),
        (2, True),
    ]
    assert [item["content"] for item in output["messages"]] == ["Grüße, 世界 🌍", ""]
    assert output["messages"][1]["parts"][0]["tool_call"] == {
        "id": "call-1",
        "name": "weather",
        "arguments": '{"city": "Berlin"}',
    }
    assert output["watched"] == output["messages"]
    assert [item["seq"] for item in output["context"]["messages"]] == [1, 2]
    assert output["error"] == {"code": 5, "details": "session not found", "status": 1}
