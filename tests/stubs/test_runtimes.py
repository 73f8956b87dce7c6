"""The stubs package keeps its promise: its wheel works with the oldest and the newest grpcio and protobuf it allows."""

import sys
from pathlib import Path

import pytest

from tests.support.commands import run

ROOT = Path(__file__).resolve().parents[2]

# Runs in the throw-away environment: every module imports, and a call goes over a real channel and back.
USE_STUBS = """
import importlib, sys
from concurrent import futures
from importlib.metadata import files, version

import grpc

modules = [str(f)[:-3].replace("/", ".") for f in files("chathistory-stubs") if f.suffix == ".py"]
for module in modules:
    importlib.import_module(module.removesuffix(".__init__"))

from buf.validate import validate_pb2
from chathistory.v1 import chat_history_service_pb2_grpc, session_pb2


class Servicer(chat_history_service_pb2_grpc.ChatHistoryServiceServicer):
    def CreateSession(self, request, context):
        return session_pb2.CreateSessionResponse(session=request.session)


server = grpc.server(futures.ThreadPoolExecutor(1))
chat_history_service_pb2_grpc.add_ChatHistoryServiceServicer_to_server(Servicer(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
session = session_pb2.Session(title="A title", state=session_pb2.SESSION_STATE_ACTIVE)
session.metadata.update({"nested": {"list": [1, "two", None, True]}})
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    stub = chat_history_service_pb2_grpc.ChatHistoryServiceStub(channel)
    reply = stub.CreateSession(session_pb2.CreateSessionRequest(session=session), timeout=10)
server.stop(None).wait()
assert reply.session == session, reply

rules = session_pb2.Session.DESCRIPTOR.fields_by_name["title"].GetOptions().Extensions[validate_pb2.field]
assert rules.string.max_len == 512, rules
print(len(modules), version("protobuf"), version("grpcio"))
"""


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("resolution", "protobuf"), [("lowest", "6.31.1"), ("highest", "7.")])
def test_wheel_works_with_the_runtimes_it_allows(
    resolution: str, protobuf: str, tmp_path: Path
) -> None:
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path,
        cwd=ROOT / "generated",
    )
    [wheel] = tmp_path.glob("*.whl")
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
    wanted = ("--resolution", resolution, "--only-binary", ":all:", wheel)
    run(uv, "pip", "install", "--quiet", "--no-config", "--python", python, *wanted, cwd=tmp_path)

    modules, found, _ = run(python, "-W", "error", "-c", USE_STUBS, cwd=tmp_path).split()

    assert found.startswith(protobuf)
    assert int(modules) >= 8
