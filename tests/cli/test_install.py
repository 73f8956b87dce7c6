"""The documented install commands, run in an empty environment with the wheels of this tree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service
from tests.support.commands import run
from tests.support.ports import free_port
from tests.support.wheels import PROJECTS, ROOT, UV, build, create_environment

PAGES = (ROOT / "README.md", ROOT / "client/README.md", *(ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"pip install [^\n`#]*\bchathistory-[^\n`#]*")
START_TIMEOUT_S = 60


def documented_commands() -> list[str]:
    """Return every documented `pip install` of a distribution of this repository."""
    return sorted({command for page in PAGES for command in COMMAND.findall(page.read_text())})


def write_constraints(path: Path, wheels: Path) -> None:
    """Constrain our distributions to wheels of this tree, and all others to the lock's versions."""
    wheels.mkdir()
    lines = [
        f"{name} @ {build(project, 'wheel', wheels).as_uri()}" for name, project in PROJECTS.items()
    ]
    lock = (ROOT / "requirements/dev.lock").read_text()
    lines += re.findall(r"^([a-z0-9][^\\\n]*==[^\\\n]*?) \\$", lock, re.MULTILINE)
    path.write_text("\n".join(lines))


def wait_until_serving(address: str, server: subprocess.Popen[bytes]) -> bool:
    """Return whether a server becomes ready. It listens, and is NOT_SERVING, a moment before."""
    end = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        while server.poll() is None and time.monotonic() < end:
            try:
                reply = health.Check(request, timeout=5)  # type: ignore[attr-defined]
            except grpc.RpcError:
                reply = None
            if reply is not None and reply.status == health_pb2.HealthCheckResponse.SERVING:
                return True
            time.sleep(0.1)
    return False


@pytest.mark.faults
@pytest.mark.network
@pytest.mark.timeout(900)
def test_documented_commands_install_a_service_that_serves(
    empty_database_url: str, tmp_path: Path
) -> None:
    constraints = tmp_path / "constraints.txt"
    # A documented command may read the wheels from a folder of this name.
    write_constraints(constraints, tmp_path / "wheels")
    python = create_environment(tmp_path / "environment")
    command = python.parent / "chat-history"

    def pip_install(arguments: str) -> None:
        # uv instead of pip, which cannot combine extras with a constraint to a file.
        options = f"--no-config --quiet --only-binary :all: --python {python}"
        program = f"{UV} pip install {options} --constraint {constraints} {arguments}"
        run("sh", "-c", program, cwd=tmp_path)

    pip_install("chathistory-service")
    assert run(command, "--version", cwd=tmp_path) == f"chat-history {service.__version__}\n"

    address = f"127.0.0.1:{free_port()}"
    variables = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": empty_database_url,
        "CHAT_HISTORY_LISTEN": address,
        "CHAT_HISTORY_SEARCH": "off",
    }
    with (tmp_path / "output").open("wb") as output:
        server = subprocess.Popen(
            [command, "serve", "--migrate"],
            cwd=tmp_path,
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        assert wait_until_serving(address, server), (tmp_path / "output").read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(START_TIMEOUT_S) == 0, (tmp_path / "output").read_text()
    finally:
        server.kill()
        server.wait()

    commands = documented_commands()
    assert commands, "no page says how to install the service"
    for documented in commands:
        pip_install(documented.removeprefix("pip install "))
    for name in PROJECTS:
        program = f"import importlib.metadata as m; print(m.version({name!r}))"
        assert run(python, "-c", program, cwd=tmp_path).strip() == service.__version__
