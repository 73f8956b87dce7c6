"""The client's wheel installs without the server's dependencies, and works."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.server import Server
from tests.support.commands import run
from tests.support.wheels import PROJECTS, build, create_environment, install, installed

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
    def install_client() -> Path:
        wheels = [
            build(PROJECTS[name], "wheel", tmp_path)
            for name in ("chathistory-stubs", "chathistory-client")
        ]
        python = create_environment(tmp_path / "environment")
        install(python, *wheels)
        assert {package["name"] for package in installed(python)} <= ALLOWED
        return python

    python = await asyncio.to_thread(install_client)
    output = await asyncio.to_thread(
        run, python, "-W", "error", "-c", PROGRAM, server.address, cwd=tmp_path
    )
    assert output.strip() == "['Hello!']"
