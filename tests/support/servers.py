"""Servers to call: in this process, or in one of its own."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio
from pydantic_settings import SettingsConfigDict

from service.config import Settings
from service.server import Server
from service.store.db.dsn import Target, parse
from tests.support.ports import free_port
from tests.support.route import routed_url

if TYPE_CHECKING:
    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub

    AsyncStub = ChatHistoryServiceAsyncStub
else:  # The class is there for type checkers alone.
    AsyncStub = ChatHistoryServiceStub

ROOT = Path(__file__).resolve().parents[2]
# Every test has a server of its own, and no call may pass through a proxy or wait for an earlier test's broken connection.
_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class _Settings(Settings):
    model_config = SettingsConfigDict(env_file=None)


def settings(**values: Any) -> Settings:
    """Return settings for a test: a free port, no delay at the end, nothing read from a file."""
    # Search has tests of its own (tests/search), which switch it on.
    given: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "shutdown_grace": 2.0,
        "search": "off",
    } | values
    return _Settings(**given)


def target_of(database_url: str) -> Target:
    """Return how a service gets to a test's database."""
    return parse(routed_url(database_url))


@asynccontextmanager
async def serving(database_url: str | Target, **values: Any) -> AsyncGenerator[Server]:
    """Run a server in this process; at the end it must have let go of everything that it took."""
    target = target_of(database_url) if isinstance(database_url, str) else database_url
    server = Server(settings(**values), target)
    await server.start()
    try:
        async with asyncio.timeout(30):
            await server.readiness.wait_ready()
        yield server
        await _comes_true(
            lambda: _busy(server) == {}, lambda: f"still at work after the test: {_busy(server)}"
        )
    finally:
        # Nobody calls any more, and hundreds of tests need not wait for those who do.
        server.calls.last_finished_at = -math.inf
        await server.stop()
    in_use = server.database.engine.pool.checkedout()  # type: ignore[attr-defined]
    assert in_use == 0, "connections were not given back to the pool"


def _busy(server: Server) -> dict[str, int]:
    """Return what a server that nobody calls should have none of."""
    database = server.database
    driver = database.hot_pool
    counts = {
        "calls": server.calls.in_flight,
        "streams": server.streams.in_flight,
        "watchers": len(server.watchers),
        "appends waiting": server.appender.queued_count,
        "driver connections in use": len(driver._busy) + driver._opening + len(driver._waiters),
        "permits taken": sum(
            permits.count - permits.free for permits in (database._permits, database._write_permits)
        ),
        # Those that the driver keeps for the next hot statement are checked out all the time.
        "connections checked out": server.database.engine.pool.checkedout() - len(driver._idle),  # type: ignore[attr-defined]
    }
    return {name: count for name, count in counts.items() if count}


async def _comes_true(condition: Any, complaint: Any, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, complaint()
        await asyncio.sleep(0.01)


def channel(address: str, **options: int) -> aio.Channel:
    """Open a channel, to be used as a context manager."""
    return aio.insecure_channel(
        address, options=_CHANNEL_OPTIONS + [(f"grpc.{k}", v) for k, v in options.items()]
    )


@asynccontextmanager
async def connected(address: str) -> AsyncGenerator[AsyncStub]:
    """Open a channel and give its stub."""
    async with channel(address) as opened:
        yield ChatHistoryServiceStub(opened)


class ServerProcess:
    """A server in a process of its own, as an async context manager; it is ended by its process id alone.

    At the end it is asked to stop and must do so with exit code 0, unless the test has ended it itself.
    """

    def __init__(
        self,
        database_url: str,
        folder: Path,
        *,
        command: Sequence[str] = ("-m", "tests.support.serve"),
        **environment: str,
    ) -> None:
        """Name what to run.

        Args:
            database_url: What it serves.
            folder: Where it runs and writes its log: an empty folder of the test's.
            command: What the interpreter runs; it prints its address when it serves.
            environment: Settings by name, such as `CHAT_HISTORY_LISTEN="127.0.0.1:50061"`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self.address = ""
        self._command = [sys.executable, *command]
        self._folder = folder
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CHAT_HISTORY_")}
        self._environment = (
            inherited
            | {
                "DATABASE_URL": routed_url(database_url),
                # One that another process can take after it.
                "CHAT_HISTORY_LISTEN": f"127.0.0.1:{free_port()}",
                "CHAT_HISTORY_SHUTDOWN_GRACE": "3",
                "CHAT_HISTORY_SEARCH": "off",
                "PYTHONPATH": os.pathsep.join(
                    filter(None, (str(ROOT), inherited.get("PYTHONPATH")))
                ),
            }
            | environment
        )
        self._process: subprocess.Popen[str] | None = None
        self._ended_by_test = False

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def launch(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=self._folder, env=self._environment,
            )  # fmt: skip

    async def start(self, *, ready: bool = True) -> Self:
        """Start it; with `ready` wait until it serves, and know its `address`."""
        self.launch()
        if ready:
            await self.wait_ready()
        return self

    async def wait_ready(self) -> str:
        """Wait until it serves and return its address."""
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, f"the server did not start:\n{self.log.read_text()}"
        self.address = line.strip()
        return self.address

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; the test sees to the end of the process itself from now on."""
        self._ended_by_test = True
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, seconds: float = 30.0) -> int:
        """Wait for its end and return the exit code; minus the signal's number when a signal has ended it."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, seconds)

    async def kill(self) -> None:
        """End it at once, as a crash would."""
        self.send_signal(signal.SIGKILL)
        await self.wait()

    async def stop(self) -> None:
        """Ask it to stop; it must do so in good order."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = await self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            await self.wait()
            raise AssertionError(f"the server did not stop:\n{self.log.read_text()}") from None
        finally:
            assert self._process.stdout is not None
            self._process.stdout.close()
        if not self._ended_by_test:
            assert code == 0, f"the server ended with {code}:\n{self.log.read_text()}"
            assert "Traceback" not in self.log.read_text(), self.log.read_text()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def status_code(error: BaseException) -> grpc.StatusCode:
    """Return the status code of a failed call."""
    assert isinstance(error, aio.AioRpcError)
    return error.code()
