"""The system under test: PostgreSQL with durable settings, and two replicas of the service.

A proxy on each side of every replica can break its connections.
"""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from service.store.db.dsn import parse
from service.store.schema.migrations import upgrade
from tests.support.cluster import Cluster
from tests.support.pgbouncer import PgBouncer, find_program
from tests.support.ports import free_port
from tests.support.proxy import Proxy, postgres_proxy
from tests.support.servers import ServerProcess


@dataclass
class Replica:
    """One process of the service, and the proxies to the database and from the clients."""

    name: str
    database_proxy: Proxy
    client_proxy: Proxy
    process: ServerProcess
    metrics: str
    """The address of its metrics."""
    database_url: str
    never_killed: bool
    """Whether no fault kills it: it must recover without a restart, and its memory is checked."""

    async def restart(self) -> None:
        """Start a killed replica again on the same port, without waiting until it is ready."""
        address = self.process.address
        folder = self.process.log.parent
        self.process = ServerProcess(
            self.database_url,
            folder,
            CHAT_HISTORY_LISTEN=address,
            CHAT_HISTORY_METRICS_LISTEN=self.metrics,
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
    def connections(self) -> int:
        """The number of open connections to the database."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(
            connection.status == psutil.CONN_ESTABLISHED
            and connection.raddr[1:] == (self.database_proxy.port,)
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
        self.cluster = Cluster()
        self.replicas: list[Replica] = []
        self.pooler: PgBouncer | None = None
        """In front of the database of the second replica; None if PgBouncer is not installed."""
        self.folder = Path()

    @property
    def database_url(self) -> str:
        """The connection string without proxies, for the checks."""
        return self.cluster.url("postgres")

    async def __aenter__(self) -> Self:
        try:
            self.folder = Path(
                self._exit.enter_context(tempfile.TemporaryDirectory(prefix="chat-history-soak-"))
            )
            self._exit.enter_context(self.cluster)
            await upgrade(parse(self.database_url))
            if find_program() is not None:
                self.pooler = self._exit.enter_context(PgBouncer(self.database_url))
            self.replicas = [
                await self._start("first", never_killed=False),
                await self._start("second", never_killed=True),
            ]
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exit.aclose()

    async def _start(self, name: str, *, never_killed: bool) -> Replica:
        if self.pooler is not None and never_killed:
            database_proxy = await self._exit.enter_async_context(
                Proxy(f"127.0.0.1:{self.pooler.port}")
            )
            url = self.pooler.url("postgres").replace(
                f":{self.pooler.port}/", f":{database_proxy.port}/"
            )
        else:
            database_proxy, url = await self._exit.enter_async_context(
                postgres_proxy(self.database_url)
            )
        metrics = f"127.0.0.1:{free_port()}"
        process = await ServerProcess(
            url, self.folder / name, CHAT_HISTORY_METRICS_LISTEN=metrics
        ).start()
        client_proxy = await self._exit.enter_async_context(Proxy(process.address))
        replica = Replica(name, database_proxy, client_proxy, process, metrics, url, never_killed)
        self._exit.push_async_callback(self._stop, replica)
        return replica

    @staticmethod
    async def _stop(replica: Replica) -> None:
        await replica.process.stop()
