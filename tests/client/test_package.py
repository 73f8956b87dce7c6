"""The client's wheel installs without the server's dependencies, and works."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from service.server import Server
from tests.support.commands import run

ROOT = Path(__file__).resolve().parents[2]
# typing-extensions is a dependency of grpcio.
ALLOWED = {
    "chathistory-client",
    "chathistory-stubs",
    "googleapis-common-protos",
    "grpcio",
    "protobuf",
    "typing-extensions",
}
PROGRAM = """
import asyncio, sys
from chathistory_client import ChatHistoryClient, message

async def main():
    async with ChatHistoryClient(sys.argv[1], options=[("grpc.enable_http_proxy", 0)]) as client:
        user = await client.create_user(name="Ada")
        reply = await client.append_messages(user_id=user.id, messages=[message("user", "Hello!")])
        page = await client.list_messages(user_id=user.id, session_id=reply.session_id)
        print([item.content for item in page.messages])

asyncio.run(main())
"""


@pytest.mark.network
@pytest.mark.timeout(600)
async def test_client_wheel_installs_with_its_own_dependencies_only_and_works(
    server: Server, tmp_path: Path
) -> None:
    def install() -> Path:
        for project in ("generated", "client"):
            run(
                sys.executable,
                "-m",
                "hatchling",
                "build",
                "-t",
                "wheel",
                "-d",
                tmp_path,
                cwd=ROOT / project,
            )
        python = tmp_path / "venv" / "bin" / "python"
        uv = Path(sys.executable).parent / "uv"
        run(
            uv,
            "venv",
            "--quiet",
            "--no-config",
            "--python",
            sys.executable,
            tmp_path / "venv",
            cwd=tmp_path,
        )
        wheels = sorted(tmp_path.glob("*.whl"))
        run(
            uv,
            "pip",
            "install",
            "-q",
            "--no-config",
            "--only-binary",
            ":all:",
            "--python",
            python,
            *wheels,
            cwd=tmp_path,
        )
        packages = json.loads(
            run(
                uv,
                "pip",
                "list",
                "--no-config",
                "--format",
                "json",
                "--python",
                python,
                cwd=tmp_path,
            )
        )
        assert {package["name"] for package in packages} <= ALLOWED
        return python

    python = await asyncio.to_thread(install)
    output = await asyncio.to_thread(
        run, python, "-W", "error", "-c", PROGRAM, server.address, cwd=tmp_path
    )
    assert output.strip() == "['Hello!']"
