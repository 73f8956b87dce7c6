"""What is soaked: PostgreSQL with durable settings, and two replicas of the service, with a proxy before and behind each of them."""

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
    """One process of the service, and its ways to the database and to its clients."""

    name: str
    back: Proxy
    front: Proxy
    process: ServerProcess
    metrics: str
    """Where it shows its metrics."""
    database_url: str
    spared: bool
    """Whether it is never killed: its memory tells, and it must recover without a restart."""

    async def restart(self) -> None:
        """Start it again on its port, after it was killed; return before it serves."""
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
        """Its resident memory; None while it is not there."""
        with suppress(psutil.NoSuchProcess):
            return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20
        return None

    @property
    def connections(self) -> int:
        """How many connections to the database it has open."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(
            each.status == psutil.CONN_ESTABLISHED and each.raddr[1:] == (self.back.port,)
            for each in found
        )

    async def gauges(self) -> dict[str, float]:
        """Return what its metrics count at this moment, by name."""
        async with httpx.AsyncClient(trust_env=False) as client:
            shown = (await client.get(f"http://{self.metrics}/metrics")).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(shown)
            for sample in family.samples
        }


class Stack:
    """All of it, as an async context manager."""

    def __init__(self) -> None:
        self._exit = AsyncExitStack()
        self.cluster = Cluster()
        self.replicas: list[Replica] = []
        self.pooler: PgBouncer | None = None
        """In transaction mode, between the second replica and the database; None where it is not installed."""
        self.folder = Path()

    @property
    def database_url(self) -> str:
        """The straight way to the database, for the judge."""
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
                await self._start("first", spared=False),
                await self._start("second", spared=True),
            ]
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._exit.aclose()

    async def _start(self, name: str, *, spared: bool) -> Replica:
        if self.pooler is not None and spared:
            back = await self._exit.enter_async_context(Proxy(f"127.0.0.1:{self.pooler.port}"))
            url = self.pooler.url("postgres").replace(f":{self.pooler.port}/", f":{back.port}/")
        else:
            back, url = await self._exit.enter_async_context(postgres_proxy(self.database_url))
        metrics = f"127.0.0.1:{free_port()}"
        process = await ServerProcess(
            url, self.folder / name, CHAT_HISTORY_METRICS_LISTEN=metrics
        ).start()
        front = await self._exit.enter_async_context(Proxy(process.address))
        replica = Replica(name, back, front, process, metrics, url, spared)
        self._exit.push_async_callback(self._stop, replica)
        return replica

    @staticmethod
    async def _stop(replica: Replica) -> None:
        await replica.process.stop()
