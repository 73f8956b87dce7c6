"""`make demo`: the service, the chatbot and its sample texts, with one command. Ctrl-C stops all of it; the data stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from chathistory_client import (
    ChatHistoryClient,
    ChatHistoryError,
    DocumentScope,
    DocumentStatus,
    HealthStatus,
)

from .loader import load
from .server import configured
from .settings import Settings

ROOT = Path(__file__).resolve().parents[2]
START = 120.0
"""Seconds that the service may take to start: the first time it makes its database."""
STOP = 30.0


class DemoFailed(Exception):
    """The demo cannot run; the text says why."""


@asynccontextmanager
async def service(settings: Settings, client: ChatHistoryClient) -> AsyncIterator[None]:
    """Run the service, unless one answers already. It has a session of its own, so that Ctrl-C stops the chatbot first."""
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
        await _becomes_ready(process, client)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _becomes_ready(process: subprocess.Popen[bytes], client: ChatHistoryClient) -> None:
    give_up = time.monotonic() + START
    while await client.check_health() is not HealthStatus.SERVING:
        if process.poll() is not None:
            raise DemoFailed(f"the service did not start (exit code {process.returncode})")
        if time.monotonic() > give_up:
            raise DemoFailed(f"the service is not ready after {START:.0f} seconds")
        await asyncio.sleep(0.2)


async def _load(client: ChatHistoryClient) -> None:
    """Load the sample texts, and wait a moment until they are found."""
    try:
        count = await load(client)
        print(f"{count} sample documents are loaded")
        async with asyncio.timeout(60):
            while await _pending(client):  # noqa: ASYNC110 - it happens in another process
                await asyncio.sleep(0.3)
    except (ChatHistoryError, TimeoutError) as error:
        print(
            f"the sample documents cannot be searched now, so answers come without sources: {error}"
        )


async def _pending(client: ChatHistoryClient) -> bool:
    """Whether some of the shared documents are not found yet."""
    page = await client.list_documents(
        scope=DocumentScope.DOCUMENT_SCOPE_SHARED,
        status=DocumentStatus.DOCUMENT_STATUS_PENDING,
        page_size=1,
    )
    return bool(page.documents)


def _check_port(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    with contextlib.closing(
        socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    ) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise DemoFailed(
                f"{listen} is taken; name another address with CHATBOT_LISTEN ({error.strerror})"
            ) from None


async def run() -> None:
    """Run the demo until Ctrl-C or SIGTERM.

    Raises:
        DemoFailed: something is in the way.
    """
    settings = Settings()
    _check_port(settings.listen)
    this = asyncio.current_task()
    loop = asyncio.get_running_loop()
    assert this is not None  # noqa: S101 - for the type checker
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.cancel)
    token = settings.history_token.get_secret_value() if settings.history_token else None
    async with (
        ChatHistoryClient(settings.history_target, tls=settings.history_tls, token=token) as client,
        service(settings, client),
    ):
        await _load(client)
        # uvicorn sees to the signals itself while it serves, and afterwards sends itself the one that came again: the service
        # must be stopped then, so all that a signal means from here on is that the chatbot ends.
        chatbot = configured(settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, setattr, chatbot, "should_exit", True)
        print(
            f"\n  the chatbot is at http://{settings.listen}  (Ctrl-C stops everything)\n",
            flush=True,
        )
        await chatbot.serve()


def main() -> None:
    """Run the demo; the exit code says how it went."""
    try:
        asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    print("stopped; everything that was said is kept")


if __name__ == "__main__":
    main()
