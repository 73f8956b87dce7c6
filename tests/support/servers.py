"""Servers in this process or in processes of their own, and channels to them."""

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
from service.store.db.database import Database
from service.store.db.dsn import Target, parse
from tests.support.ports import free_port
from tests.support.route import routed_url

if TYPE_CHECKING:
    from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceAsyncStub

    AsyncStub = ChatHistoryServiceAsyncStub
else:  # The class exists for type checkers only.
    AsyncStub = ChatHistoryServiceStub

ROOT = Path(__file__).resolve().parents[2]
# No call may use the machine's HTTP proxy or wait for the broken connection of an earlier test.
_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class _Settings(Settings):
    model_config = SettingsConfigDict(env_file=None)


def settings(**values: Any) -> Settings:
    """Return settings for a test: a free port, a short shutdown, nothing read from a file."""
    # Tests of search (tests/search) enable it.
    defaults: dict[str, Any] = {"listen": "127.0.0.1:0", "shutdown_grace": 2.0, "search": "off"}
    return _Settings(**(defaults | values))


def target_of(database_url: str) -> Target:
    """Return the target with which a service connects to a test's database."""
    return parse(routed_url(database_url))


@asynccontextmanager
async def serving(database_url: str | Target, **values: Any) -> AsyncGenerator[Server]:
    """Run a server in this process; at the end it must have released all its resources."""
    target = target_of(database_url) if isinstance(database_url, str) else database_url
    server = Server(settings(**values), target)
    await server.start()
    try:
        async with asyncio.timeout(30):
            await server.readiness.wait_ready()
        yield server
        await _wait_until_idle(server)
    finally:
        # Skips the wait for recent callers at shutdown: the test has ended and makes no more calls.
        server.calls.last_finished_at = -math.inf
        await server.stop()
    in_use = _checked_out(server.database)
    assert in_use == 0, "connections were not returned to the pool"


def _resources_in_use(server: Server) -> dict[str, int]:
    """Return the counts, other than zero, of resources that an idle server must not hold."""
    database = server.database
    hot_pool = database.hot_pool
    counts = {
        "calls": server.calls.in_flight,
        "streams": server.streams.in_flight,
        "watchers": len(server.watchers),
        "appends waiting": server.appender.queued_count,
        "hot connections in use": len(hot_pool._busy) + hot_pool._opening + len(hot_pool._waiters),
        "permits taken": sum(
            permits.permit_count - permits.free_count
            for permits in (
                database._permits,
                database._write_permits,
                database.expensive_work.permits,
            )
        ),
        # The connections of the hot pool stay checked out of the pool.
        "connections checked out": _checked_out(database) - len(hot_pool._idle),
    }
    if server.lagging is not None:
        counts["replica connections checked out"] = _checked_out(server.lagging.replica)
    return {name: count for name, count in counts.items() if count}


def _checked_out(database: Database) -> int:
    """Return the number of connections that are checked out of the pool."""
    count: int = database.engine.pool.checkedout()  # type: ignore[attr-defined]
    return count


async def _wait_until_idle(server: Server, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while in_use := _resources_in_use(server):
        assert time.monotonic() < deadline, f"still in use after the test: {in_use}"
        await asyncio.sleep(0.01)


def channel(address: str, **options: int) -> aio.Channel:
    """Return a channel, to be used as a context manager; options are named without `grpc.`."""
    extra = [(f"grpc.{name}", value) for name, value in options.items()]
    return aio.insecure_channel(address, options=_CHANNEL_OPTIONS + extra)


@asynccontextmanager
async def connected(address: str) -> AsyncGenerator[AsyncStub]:
    """Open a channel and provide its stub."""
    async with channel(address) as connection:
        yield ChatHistoryServiceStub(connection)


def defects_in(log: str) -> list[str]:
    """Return the lines of a log that report an exception which nothing has handled."""
    return [
        line
        for line in log.splitlines()
        if "Traceback" in line
        or '"unhandled exception"' in line
        or ('"message of a library"' in line and '"error": null' not in line)
    ]


class ServerProcess:
    """A server in a process of its own, as an async context manager.

    At the end it receives SIGTERM and must exit with code 0 and without a traceback, unless the
    test has sent it a signal.
    """

    def __init__(
        self,
        database_url: str,
        folder: Path,
        *,
        command: Sequence[str] = ("-m", "tests.support.serve"),
        **environment: str,
    ) -> None:
        """Configure the process; `start` or `launch` starts it.

        Args:
            database_url: Connection string of its database.
            folder: Working folder of the process, to which its log is written.
            command: Arguments of the interpreter. The program must print its address once it is
                ready.
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
                # A fixed port, so that another process can be started on it afterwards.
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
        """Start the process without waiting for it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self._folder,
                env=self._environment,
            )

    async def start(self, *, ready: bool = True) -> Self:
        """Start the process, and with `ready` wait until it is ready and set its `address`."""
        self.launch()
        if ready:
            await self.wait_ready()
        return self

    async def wait_ready(self) -> str:
        """Wait until the server is ready, and return its address."""
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, f"the server did not start:\n{self.log.read_text()}"
        self.address = line.strip()
        return self.address

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; from now on the test is responsible for the end of the process."""
        self._ended_by_test = True
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self, seconds: float = 30.0) -> int:
        """Wait for the process to end; return its exit code, or minus the signal that ended it."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, seconds)

    async def kill(self) -> None:
        """Kill the process, as a crash would."""
        self.send_signal(signal.SIGKILL)
        await self.wait()

    async def stop(self) -> None:
        """Send SIGTERM and assert that the server shuts down in order."""
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
            log = self.log.read_text()
            assert not defects_in(log), log

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def status_code(error: BaseException) -> grpc.StatusCode:
    """Return the status code of a failed call."""
    assert isinstance(error, aio.AioRpcError)
    return error.code()
