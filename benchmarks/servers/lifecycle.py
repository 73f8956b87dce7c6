"""The life cycle of a reference server: run, announce the address, serve, stop at a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine

import uvloop
from chathistory.v1 import chat_history_service_pb2_grpc
from grpc import aio


def announce_address(address: str) -> None:
    """Print the address for the process that waits for it."""
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()


async def wait_for_stop_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    is_stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, is_stopping.set)
    await is_stopping.wait()


async def serve(servicer: chat_history_service_pb2_grpc.ChatHistoryServiceServicer) -> None:
    """Serve a generated servicer, without the service's pipeline."""
    server = aio.server()
    chat_history_service_pb2_grpc.add_ChatHistoryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    announce_address(f"127.0.0.1:{port}")
    await wait_for_stop_signal()
    await server.stop(1)


def run(main: Coroutine[object, object, None]) -> None:
    """Run a server until it stops."""
    uvloop.run(main)


def database_url() -> str:
    """Return the connection string of the server's database."""
    return os.environ["DATABASE_URL"]
