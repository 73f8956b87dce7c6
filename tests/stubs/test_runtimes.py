"""The stubs' wheel works with the oldest and the newest grpcio and protobuf that it allows."""

from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.wheels import PROJECTS, build, create_environment, install

# Runs in a temporary environment: imports every module and makes a call over a real channel.
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

options = session_pb2.Session.DESCRIPTOR.fields_by_name["title"].GetOptions()
rules = options.Extensions[validate_pb2.field]
assert rules.string.max_len == 512, rules
print(len(modules), version("protobuf"), version("grpcio"))
"""


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("resolution", "protobuf"), [("lowest", "6.31.1"), ("highest", "7.")])
def test_wheel_works_with_the_runtimes_it_allows(
    resolution: str, protobuf: str, tmp_path: Path
) -> None:
    wheel = build(PROJECTS["chathistory-stubs"], "wheel", tmp_path)
    python = create_environment(tmp_path / "environment")
    install(python, "--resolution", resolution, wheel)

    modules, installed, _ = run(python, "-W", "error", "-c", USE_STUBS, cwd=tmp_path).split()

    assert installed.startswith(protobuf)
    assert int(modules) >= 8
