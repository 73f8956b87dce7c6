"""`make demo`: run the service, the chatbot and its sample documents with one command.

Ctrl-C stops all of them. The data is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from chathistory_client import (
    ChatHistoryClient,
    ChatHistoryError,
    DocumentScope,
    DocumentStatus,
    HealthStatus,
)

from .history import create_client
from .loader import load
from .server import create_server
from .settings import Settings

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
"""Time for the service to become ready; at its first start it creates its database."""
STOP_TIMEOUT_S = 30.0
INDEX_TIMEOUT_S = 60.0


class DemoFailed(Exception):
    """The demo cannot run, for the reason in the message."""


def main() -> None:
    """Run the demo. Exits with 1 if it cannot run."""
    try:
        asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    print("stopped; all conversations are kept")


async def run() -> None:
    """Run the demo until Ctrl-C or SIGTERM.

    Raises:
        DemoFailed: the chatbot's port is in use, or the service did not start.
    """
    settings = Settings()
    _check_port(settings.listen)
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    _on_stop_signals(task.cancel)
    async with create_client(settings) as client, _running_service(settings, client):
        await _load_documents(client)
        chatbot = create_server(settings)
        # uvicorn handles the signals while it serves, and raises them again afterwards, when the
        # service must still be stopped. From here on a signal only ends the chatbot.
        _on_stop_signals(lambda: setattr(chatbot, "should_exit", True))
        chatbot.announcement = f"\n  {chatbot.announcement}  (Ctrl-C stops everything)\n"
        await chatbot.serve()


def _on_stop_signals(callback: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, callback)


def _check_port(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise DemoFailed(
                f"cannot listen on {listen} ({error.strerror}); "
                "set CHATBOT_LISTEN to another address"
            ) from None


@asynccontextmanager
async def _running_service(settings: Settings, client: ChatHistoryClient) -> AsyncIterator[None]:
    """Run the service, unless one is running already.

    The process gets a process group of its own, so that Ctrl-C stops the chatbot before it.
    """
    if await client.check_health() is not HealthStatus.UNREACHABLE:
        print(f"using the service that is running at {settings.history_target}")
        yield
        return
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "service", "serve", "--migrate"],
        cwd=ROOT,
        env=os.environ | {"CHAT_HISTORY_LISTEN": settings.history_target},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await _wait_until_ready(process, client)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _wait_until_ready(process: subprocess.Popen[bytes], client: ChatHistoryClient) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while await client.check_health() is not HealthStatus.SERVING:
        if process.poll() is not None:
            raise DemoFailed(f"the service did not start (exit code {process.returncode})")
        if time.monotonic() > deadline:
            raise DemoFailed(f"the service is not ready after {START_TIMEOUT_S:.0f} seconds")
        await asyncio.sleep(0.2)


async def _load_documents(client: ChatHistoryClient) -> None:
    """Load the sample documents and wait until they can be searched."""
    try:
        count = await load(client)
        print(f"{count} sample documents are loaded")
        async with asyncio.timeout(INDEX_TIMEOUT_S):
            while await _is_indexing(client):  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.3)
    except (ChatHistoryError, TimeoutError) as error:
        print(
            "the sample documents cannot be searched at the moment, "
            f"so answers have no sources: {error}"
        )


async def _is_indexing(client: ChatHistoryClient) -> bool:
    page = await client.list_documents(
        scope=DocumentScope.DOCUMENT_SCOPE_SHARED,
        status=DocumentStatus.DOCUMENT_STATUS_PENDING,
        page_size=1,
    )
    return bool(page.documents)


if __name__ == "__main__":
    main()
