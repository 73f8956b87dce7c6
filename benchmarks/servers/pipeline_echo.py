"""The echo behind the service's own pipeline, without any other part of the service."""

from __future__ import annotations

from typing import Any

import grpc
from grpc import aio

from benchmarks.servers.echo import Echo
from benchmarks.servers.lifecycle import announce_address, run, wait_for_stop_signal
from service.auth.authenticators import trust_all
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.byte_budget import ByteBudget
from service.rpc.health import SERVICE
from service.rpc.pipeline import Pipeline
from service.rpc.servicer import DESCRIPTOR


def pipeline(**parts: Any) -> Pipeline:
    """Return the service's pipeline without metrics and identity, with the arguments in `parts`."""
    arguments: dict[str, Any] = {
        "authenticate": trust_all,
        "calls": Admission(1024),
        "streams": StreamAdmission(1024, 128),
        "budget": ByteBudget(1 << 30, 1 << 30, 1 << 30),
        "call_timeout_s": 30.0,
    }
    return Pipeline(**(arguments | parts))


async def _serve() -> None:
    server = aio.server()
    # The echo's methods ignore their second argument, so the pipeline may pass a Call.
    handlers = pipeline().handlers(DESCRIPTOR, Echo())  # type: ignore[abstract]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce_address(f"127.0.0.1:{port}")
    await wait_for_stop_signal()
    await server.stop(1)


if __name__ == "__main__":
    run(_serve())
