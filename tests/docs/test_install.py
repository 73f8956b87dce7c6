"""The documented commands install the distributions in an empty environment, and they serve."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chathistory_client import HealthStatus
from tests.docs.fences import fences_of
from tests.support.clients import client_of
from tests.support.commands import run
from tests.support.ports import free_port
from tests.support.servers import ROOT
from tests.support.wheels import PROJECTS, build

READY_TIMEOUT_S = 120
BUILD = "pip wheel"
INSTALLS = ("pip install 'chathistory-service[auth,embedded,search]'", BUILD)


def commands(first_line: str) -> str:
    """Return the README's example that begins so."""
    [code] = [
        fence.code
        for fence in fences_of(ROOT / "README.md", ROOT)
        if fence.key[1].startswith(first_line)
    ]
    return code


def checkout(folder: Path) -> Path:
    """Copy the files of the repository."""
    files = run(
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        cwd=ROOT,
    )
    for name in filter(lambda name: (ROOT / name).is_file(), files.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.faults
@pytest.mark.network
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first_line", INSTALLS)
async def test_the_documented_commands_install_and_serve(first_line: str, folder: Path) -> None:
    environment = folder / "venv"
    await asyncio.to_thread(run, sys.executable, "-m", "venv", environment, cwd=folder)
    port = free_port()
    variables = {
        "HOME": str(folder),
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "CHAT_HISTORY_LISTEN": f"127.0.0.1:{port}",
        "CHAT_HISTORY_DATA_DIR": str(folder / "data"),
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip")),
    }
    work = folder / "work"
    work.mkdir()
    script = commands(first_line)
    if first_line == BUILD:
        checkout(work)
    else:
        # The distributions are not published: pip takes them from the folder of wheels.
        for project in PROJECTS.values():
            await asyncio.to_thread(build, project, "wheel", folder / "wheels")
        variables["PIP_FIND_LINKS"] = str(folder / "wheels")
        script += "chat-history serve\n"
    install, serve, _ = script.rpartition("chat-history serve\n")
    await execute(install, work, variables)
    await execute("pip check", work, variables)
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(  # noqa: ASYNC220 - it runs on
            ["bash", "-c", f"exec {serve}"], cwd=work, env=variables, stdout=log, stderr=log
        )
    try:
        async with client_of(f"127.0.0.1:{port}") as client, asyncio.timeout(READY_TIMEOUT_S):
            while await client.check_health() is not HealthStatus.SERVING:
                assert server.poll() is None, (folder / "server.log").read_text()
                await asyncio.sleep(0.2)
            # The search process has loaded its model.
            while await client.check_health("search") is not HealthStatus.SERVING:
                assert server.poll() is None, (folder / "server.log").read_text()
                await asyncio.sleep(0.2)
    finally:
        server.terminate()
        code = await asyncio.to_thread(server.wait, 60)
    assert code == 0, (folder / "server.log").read_text()


async def execute(script: str, folder: Path, variables: dict[str, str]) -> None:
    """Run commands to their end, outside of the environment that the tests run in."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", script, cwd=folder, env=variables,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
