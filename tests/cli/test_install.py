"""The documented install commands, run in an empty environment with the wheels of this tree."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service
from tests.support.commands import run
from tests.support.ports import free_port
from tests.support.wheels import PROJECTS, ROOT, build, create_environment, install

PAGES = (ROOT / "README.md", ROOT / "client/README.md", *(ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"pip install (?P<requirements>[^\n`#]*chathistory-[^\n`#]*)")
START_TIMEOUT_S = 60


def documented_requirements() -> Iterator[str]:
    """Yield the requirements of every documented `pip install` of one of our distributions."""
    for page in PAGES:
        for match in COMMAND.finditer(page.read_text()):
            yield from re.findall(r"chathistory-[\w\[\],-]+", match["requirements"])


def constraints(folder: Path) -> Path:
    """Write constraints: our distributions from wheels of this tree, all others as in the lock."""
    lines = [
        f"{name} @ {build(project, 'wheel', folder).as_uri()}" for name, project in PROJECTS.items()
    ]
    lock = (ROOT / "requirements/dev.lock").read_text()
    lines += re.findall(r"^([a-z0-9][^\\\n]*==[^\\\n]*?) \\$", lock, re.MULTILINE)
    path = folder / "constraints.txt"
    path.write_text("\n".join(lines))
    return path


def is_serving(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        reply = health.Check(  # type: ignore[attr-defined]
            request, timeout=START_TIMEOUT_S, wait_for_ready=True
        )
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.faults
@pytest.mark.network
@pytest.mark.timeout(900)
def test_documented_commands_install_a_service_that_serves(
    empty_database_url: str, tmp_path: Path
) -> None:
    python = create_environment(tmp_path / "environment")
    command = python.parent / "chat-history"
    constrained = ("--constraints", constraints(tmp_path))

    install(python, *constrained, "chathistory-service")
    assert run(command, "--version", cwd=tmp_path) == f"chat-history {service.__version__}\n"

    address = f"127.0.0.1:{free_port()}"
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": empty_database_url,
        "CHAT_HISTORY_LISTEN": address,
        "CHAT_HISTORY_SEARCH": "off",
    }
    with (tmp_path / "output").open("wb") as output:
        server = subprocess.Popen(
            [command, "serve", "--migrate"],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        assert is_serving(address), (tmp_path / "output").read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(START_TIMEOUT_S) == 0, (tmp_path / "output").read_text()
    finally:
        server.kill()
        server.wait()

    requirements = sorted(set(documented_requirements()))
    assert requirements, "no page says how to install the service"
    install(python, *constrained, *requirements)
    for name in {requirement.partition("[")[0] for requirement in requirements}:
        program = f"import importlib.metadata as m; print(m.version({name!r}))"
        assert run(python, "-c", program, cwd=tmp_path).strip() == service.__version__
