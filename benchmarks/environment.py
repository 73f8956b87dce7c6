"""The environment of a run: a durable PostgreSQL, and servers in their own processes."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import asyncpg
import grpc
import psutil
from chathistory.v1 import chat_history_service_pb2_grpc
from grpc_health.v1 import health_pb2

from benchmarks.load_generator import BenchError, compile_load_generator
from service.embedded.postgres import EmbeddedPostgres
from service.store.db import dsn
from service.store.schema import migrations

ROOT = Path(__file__).resolve().parent.parent
WORK_DIR = ROOT / ".bench"
"""Folder of the load generator, databases and logs, on the disk of the embedded default."""
START_TIMEOUT_S = 30.0
SEARCH_PATH = "public, chathistory"
"""Schemas of the service's tables: earlier versions have them in `public`."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    address: str
    pid: int

    @property
    def rss_bytes(self) -> int:
        """Resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    @asynccontextmanager
    async def stub(
        self,
    ) -> AsyncIterator[chat_history_service_pb2_grpc.ChatHistoryServiceAsyncStub]:
        """Yield a client for calls that are not measured."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            yield chat_history_service_pb2_grpc.ChatHistoryServiceStub(channel)


class Environment:
    """PostgreSQL in a new folder, and the servers that use it. All of them stop with the block."""

    def __init__(self) -> None:
        self._exit_stack = AsyncExitStack()
        self.folder = WORK_DIR
        self.load_generator = WORK_DIR

    async def __aenter__(self) -> Self:
        self.load_generator = await asyncio.to_thread(compile_load_generator, WORK_DIR)
        self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=WORK_DIR))
        self._exit_stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        try:
            self._postgres = EmbeddedPostgres(self.folder / "data", listen="none (benchmark)")
            await asyncio.to_thread(self._postgres.start)
            self._exit_stack.callback(self._postgres.stop)
            await self._check_durable()
        except BaseException:
            await self._exit_stack.aclose()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exit_stack.aclose()

    async def _check_durable(self) -> None:
        connection = await asyncpg.connect(self.database_url("postgres"))
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            if await connection.fetchval(f"SHOW {setting}") != "on":
                raise BenchError(
                    f"PostgreSQL's {setting} is off: the measured writes would not be durable"
                )
        self.postgres_version: str = await connection.fetchval("SHOW server_version")
        await connection.close()

    def database_url(self, name: str) -> str:
        """Return the connection string of one of the databases."""
        return re.sub(r"/postgres\?", f"/{name}?", self._postgres.url)

    async def new_database(self, name: str, tree: Path = ROOT) -> str:
        """Create a database with the schema of a source tree and return its connection string.

        Raises:
            BenchError: the tree could not migrate it.
        """
        connection = await asyncpg.connect(self.database_url("postgres"))
        await connection.execute(f'CREATE DATABASE "{name}"')
        await connection.close()
        url = self.database_url(name)
        if tree == ROOT:
            await migrations.upgrade(dsn.parse(url))
            return url
        # Another version may keep its tables in another schema, and have other migrations.
        log = f"migrate-{name}"
        variables = {"DATABASE_URL": url, "PYTHONPATH": source_path(tree)}
        async with self._run(log, "service", "migrate", **variables) as process:
            if await process.wait():
                raise BenchError(f"{tree} cannot migrate:\n{self.log(log)}")
        return url

    @asynccontextmanager
    async def connect(self, name: str) -> AsyncIterator[asyncpg.Connection]:
        """Connect to a database directly."""
        connection = await asyncpg.connect(
            self.database_url(name), server_settings={"search_path": SEARCH_PATH}
        )
        try:
            yield connection
        finally:
            await connection.close()

    def postgres_cpu_s(self) -> float:
        """Return the CPU time of all processes of PostgreSQL so far, including ended ones."""
        postmaster = psutil.Process(self._postgres.pid)
        times = postmaster.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in postmaster.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child_times = child.cpu_times()
                total += child_times.user + child_times.system
        return float(total)

    @asynccontextmanager
    async def service(
        self, database: str, name: str = "service", **settings: str
    ) -> AsyncIterator[Server]:
        """Run the service as an operator does, with `python -m service serve`.

        Search is off, unless `settings` turn it on.
        """
        address = _free_address()
        variables = {
            "DATABASE_URL": self.database_url(database),
            "CHAT_HISTORY_LISTEN": address,
            "CHAT_HISTORY_LOG_FORMAT": "json",
            "CHAT_HISTORY_LOG_LEVEL": "warning",
            "CHAT_HISTORY_DATA_DIR": str(self.folder / f"{name}-data"),
            "CHAT_HISTORY_SEARCH": "off",
            **settings,
        }
        async with self._run(name, "service", "serve", **variables) as process:
            server = Server(name, address, process.pid)
            await self._wait_until_ready(server, process)
            yield server

    @asynccontextmanager
    async def reference_server(
        self, module: str, database: str | None = None
    ) -> AsyncIterator[Server]:
        """Run a module of `benchmarks.servers`."""
        variables = {} if database is None else {"DATABASE_URL": self.database_url(database)}
        async with self._run(module, f"benchmarks.servers.{module}", **variables) as process:
            assert process.stdout is not None  # noqa: S101 - a pipe
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
            if not line:
                raise BenchError(f"{module} did not start:\n{self.log(module)}")
            yield Server(module, line.decode().strip(), process.pid)

    @asynccontextmanager
    async def _run(
        self, name: str, module: str, *arguments: str, **variables: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CHAT_HISTORY_", "PG", "NEON_", "QDRANT_"))
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                # This folder has no .env file.
                cwd=self.folder, env=inherited | {"PYTHONPATH": str(ROOT)} | variables,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            await _stop(process)

    async def _wait_until_ready(self, server: Server, process: asyncio.subprocess.Process) -> None:
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        async with grpc.aio.insecure_channel(server.address) as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            while process.returncode is None and asyncio.get_running_loop().time() < deadline:
                with suppress(grpc.aio.AioRpcError):
                    reply = await check(
                        health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=1
                    )
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(0.05)
        raise BenchError(f"{server.name} did not become ready:\n{self.log(server.name)}")

    def log(self, name: str) -> str:
        """Return the end of a server's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]


def source_path(tree: Path) -> str:
    """Return the PYTHONPATH that runs the service of a source tree."""
    return f"{tree}:{tree / 'generated'}"


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
