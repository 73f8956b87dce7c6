"""The system under test: two replicas of the service, their database and their search index.

A proxy on each side of every replica can break its connections.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.soak.database import SoakDatabase
from tests.support.pgbouncer import PgBouncer
from tests.support.ports import free_port
from tests.support.proxy import Proxy
from tests.support.servers import ROOT, ServerProcess

FIRST, SECOND = "chat_first", "chat_second"
"""The role in the database of each replica."""
_SEARCH_PROCESS = "service.search.worker.child"


@dataclass
class Replica:
    """One process of the service, and the proxies to the database and from the clients."""

    name: str
    role: str
    """Its role in the database."""
    database_proxies: Sequence[Proxy]
    """The proxies to the pooler, or to each node of the database."""
    client_proxy: Proxy
    process: ServerProcess
    metrics: str
    """The address of its metrics."""
    database_url: str
    settings: dict[str, str]
    """Its environment, besides the addresses."""
    never_killed: bool
    """Whether no fault kills it: it must recover without a restart, and its memory is checked."""
    is_pooled: bool
    """Whether it connects through PgBouncer."""

    @property
    def client_proxies(self) -> list[Proxy]:
        """The proxy from the clients."""
        return [self.client_proxy]

    async def restart(self) -> None:
        """Start a killed replica again on the same port, without waiting until it is ready."""
        address = self.process.address
        folder = self.process.log.parent
        self.process = ServerProcess(
            self.database_url,
            folder,
            CHAT_HISTORY_LISTEN=address,
            CHAT_HISTORY_METRICS_LISTEN=self.metrics,
            **self.settings,
        )
        self.process.launch()
        self.process.address = address

    @property
    def rss_mib(self) -> float | None:
        """Its resident memory; None while the process does not exist."""
        with suppress(psutil.NoSuchProcess):
            return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20
        return None

    @property
    def descriptors(self) -> int:
        """The number of its open file descriptors; 0 while the process does not exist."""
        with suppress(psutil.NoSuchProcess):
            return int(psutil.Process(self.process.pid).num_fds())
        return 0

    @property
    def search_processes(self) -> list[psutil.Process]:
        """Its search process; empty while it starts."""
        with suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(self.process.pid).children()
                if _SEARCH_PROCESS in child.cmdline()
            ]
        return []

    @property
    def connections(self) -> int:
        """The number of open connections to the database."""
        ports = {proxy.port for proxy in self.database_proxies}
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(
            connection.status == psutil.CONN_ESTABLISHED and connection.raddr[1] in ports
            for connection in connections
        )

    async def gauges(self) -> dict[str, float]:
        """Return the current values of its metrics by name."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://{self.metrics}/metrics")).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


class Stack:
    """The whole system, as an async context manager."""

    def __init__(self) -> None:
        self._exit = AsyncExitStack()
        self.database = SoakDatabase([FIRST, SECOND], pooled_role=SECOND)
        self.replicas: list[Replica] = []
        self.folder = Path()
        self._search: dict[str, str] = {}

    @property
    def database_url(self) -> str:
        """The connection string without proxies, for the checks."""
        return self.database.url

    @property
    def pooler(self) -> PgBouncer | None:
        """In front of the database of the second replica; None if PgBouncer is not installed."""
        return self.database.pooler

    def some_replicas(self, rng: random.Random) -> list[Replica]:
        """Draw one replica or all of them."""
        return rng.choice([self.replicas, *([replica] for replica in self.replicas)])

    async def __aenter__(self) -> Self:
        try:
            self.folder = Path(
                self._exit.enter_context(tempfile.TemporaryDirectory(prefix="chat-history-soak-"))
            )
            await self._exit.enter_async_context(self.database)
            self._search = await self._start_index()
            self.replicas = [
                await self._start("first", FIRST, never_killed=False),
                await self._start("second", SECOND, never_killed=True),
            ]
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exit.aclose()

    async def _start_index(self) -> dict[str, str]:
        """Start the search index of both replicas, and return their settings for it."""
        process = subprocess.Popen(  # noqa: ASYNC220 - returns quickly
            [sys.executable, "-m", "tests.search.qdrant_server", "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._exit.callback(_end, process)
        assert process.stdout is not None
        port = (await asyncio.to_thread(process.stdout.readline)).strip()
        assert port, "the search index does not start"
        return {
            "CHAT_HISTORY_SEARCH": "on",
            # Documents only: the traffic appends more messages than this index could hold.
            "CHAT_HISTORY_INDEX_MESSAGES": "false",
            "CHAT_HISTORY_QDRANT_GRPC_PORT": port,
            "CHAT_HISTORY_SEARCH_TIMEOUT": "3",
            "QDRANT_URL": "http://127.0.0.1:1",
        }

    async def _start(self, name: str, role: str, *, never_killed: bool) -> Replica:
        pooler = self.pooler if role == SECOND else None
        upstreams = (
            [f"127.0.0.1:{pooler.port}"]
            if pooler is not None
            else [node.address for node in self.database.nodes]
        )
        proxies = [await self._exit.enter_async_context(Proxy(upstream)) for upstream in upstreams]
        url = self.database.url_of(role, [proxy.port for proxy in proxies])
        if pooler is not None:
            url += "&pgbouncer=true"
        metrics = f"127.0.0.1:{free_port()}"
        process = await ServerProcess(
            url, self.folder / name, CHAT_HISTORY_METRICS_LISTEN=metrics, **self._search
        ).start()
        replica = Replica(
            name=name,
            role=role,
            database_proxies=proxies,
            client_proxy=await self._exit.enter_async_context(Proxy(process.address)),
            process=process,
            metrics=metrics,
            database_url=url,
            settings=self._search,
            never_killed=never_killed,
            is_pooled=pooler is not None,
        )
        self._exit.push_async_callback(self._stop, replica)
        return replica

    @staticmethod
    async def _stop(replica: Replica) -> None:
        await replica.process.stop()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
