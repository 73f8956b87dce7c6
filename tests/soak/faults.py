"""Faults of the service, its database, its search, and the network between them.

A fault ends as soon as the broken component could work again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg

from tests.soak.database import finish
from tests.soak.database_faults import DatabaseFaults
from tests.soak.search_faults import SearchFaults
from tests.soak.stack import Replica, Stack
from tests.support.cluster import fetch
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import Direction, Proxy

BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'chat-history'"
TERMINATE_BACKENDS = f"SELECT pg_terminate_backend(pid) FROM ({BACKENDS}) AS them"

Fault = Callable[[], Awaitable[list[Replica]]]
"""Breaks a component for some seconds, restores it, and returns the affected replicas."""


class Faults:
    """Draws faults, each kind as often as any other."""

    def __init__(self, stack: Stack, chance: random.Random) -> None:
        self._stack = stack
        self._rng = chance
        search = SearchFaults(stack, chance)
        self.of_search = frozenset(search.kinds)
        """The names of the faults after which searches must succeed."""
        self._kinds: dict[str, Fault] = {
            "service killed (-9)": self._kill_service,
            "PostgreSQL killed (-9)": self._kill_postgres,
            "a backend killed (-9)": self._kill_backend,
            "PostgreSQL restarted": self._restart_postgres,
            "all backends ended": self._terminate_backends,
            "suspended, 3 s to wake": self._suspend,
            "database cut off": lambda: self._disturb_network("database_proxies", self._reset),
            "database half-open": lambda: self._disturb_network(
                "database_proxies", self._half_open
            ),
            "database refuses": lambda: self._disturb_network("database_proxies", self._refuse),
            "database black-holed": lambda: self._disturb_network("database_proxies", self._block),
            "database slow": lambda: self._disturb_network("database_proxies", self._delay),
            "clients cut off": lambda: self._disturb_network("client_proxies", self._reset),
            "clients refused": lambda: self._disturb_network("client_proxies", self._refuse),
            "clients black-holed": lambda: self._disturb_network("client_proxies", self._block),
            **DatabaseFaults(stack, chance).kinds,
            **search.kinds,
        }
        if stack.pooler is not None:
            self._kinds |= {
                "PgBouncer killed (-9)": self._kill_pooler,
                "PgBouncer restarted": self._restart_pooler,
            }
        self._bag: list[str] = []

    @property
    def kinds(self) -> list[str]:
        """The names of all faults."""
        return list(self._kinds)

    def draw(self) -> tuple[str, Fault]:
        """Return the next fault and its name."""
        if not self._bag:
            self._bag = self.kinds
            self._rng.shuffle(self._bag)
        name = self._bag.pop()
        return name, self._kinds[name]

    async def repair(self) -> None:
        """Restore what a fault has left broken although the service could work again."""
        await self._stack.database.repair()

    async def _wait(self, least: float, most: float) -> None:
        await asyncio.sleep(self._rng.uniform(least, most))

    async def _kill_service(self) -> list[Replica]:
        replica = self._rng.choice(
            [replica for replica in self._stack.replicas if not replica.never_killed]
        )
        await replica.process.kill()
        await replica.process.stop()
        await self._wait(0, 1)
        await replica.restart()
        return [replica]

    async def _kill_postgres(self) -> list[Replica]:
        await self._stack.database.kill()
        await self._restart_postgres()
        return self._stack.replicas

    async def _kill_backend(self) -> list[Replica]:
        """PostgreSQL then ends all backends and recovers as after a crash."""
        for [pid] in await fetch(self._stack.database_url, f"{BACKENDS} LIMIT 1"):
            _kill(pid)
        async with asyncio.timeout(60):
            while not await self._is_answering():
                await asyncio.sleep(0.02)
        return self._stack.replicas

    async def _restart_postgres(self) -> list[Replica]:
        await self._stack.database.stop()
        try:
            await self._wait(0, 1)
        finally:
            await self._stack.database.start()
        return self._stack.replicas

    async def _kill_pooler(self) -> list[Replica]:
        return await self._restart_stopped_pooler(PgBouncer.kill)

    async def _restart_pooler(self) -> list[Replica]:
        return await self._restart_stopped_pooler(PgBouncer.stop)

    async def _restart_stopped_pooler(self, end: Callable[[PgBouncer], None]) -> list[Replica]:
        pooler = self._stack.pooler
        assert pooler is not None
        await finish(lambda: end(pooler))
        try:
            await self._wait(0, 1)
        finally:
            await finish(pooler.start)
        return [replica for replica in self._stack.replicas if replica.is_pooled]

    async def _is_answering(self) -> bool:
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await fetch(self._stack.database_url, "SELECT")
            return True
        return False

    async def _terminate_backends(self) -> list[Replica]:
        for _ in range(self._rng.randint(1, 5)):
            await fetch(self._stack.database_url, TERMINATE_BACKENDS)
            await self._wait(0, 0.2)
        return self._stack.replicas

    async def _suspend(self) -> list[Replica]:
        proxies = [proxy for replica in self._stack.replicas for proxy in replica.database_proxies]
        try:
            for proxy in proxies:
                proxy.block()
            await fetch(self._stack.database_url, TERMINATE_BACKENDS)
            await asyncio.sleep(3)
        finally:
            for proxy in proxies:
                proxy.unblock()
        return self._stack.replicas

    async def _disturb_network(
        self, side: str, break_it: Callable[[Proxy], Awaitable[None]]
    ) -> list[Replica]:
        """Break the network on one side of one replica or of all replicas, and restore it."""
        replicas = self._stack.some_replicas(self._rng)
        proxies = [proxy for replica in replicas for proxy in getattr(replica, side)]
        try:
            await asyncio.gather(*map(break_it, proxies))
        finally:
            for proxy in proxies:
                proxy.accept_connections()
                proxy.unblock()
                proxy.delay = 0.0
        return replicas

    async def _reset(self, proxy: Proxy) -> None:
        for _ in range(self._rng.randint(1, 5)):
            proxy.reset_connections()
            await self._wait(0, 0.2)

    async def _half_open(self, proxy: Proxy) -> None:
        proxy.reset_clients()
        await self._wait(0, 0.2)

    async def _refuse(self, proxy: Proxy) -> None:
        proxy.refuse_connections()
        await self._wait(0.1, 4)

    async def _block(self, proxy: Proxy) -> None:
        proxy.block(*self._rng.choice([(), (Direction.TO_SERVER,), (Direction.TO_CLIENT,)]))
        await self._wait(0.1, 6)
        if self._rng.random() < 0.5:
            proxy.reset_connections()

    async def _delay(self, proxy: Proxy) -> None:
        proxy.delay = self._rng.uniform(0.02, 0.3)
        await self._wait(1, 4)


def _kill(pid: int) -> None:
    """Kill a process, as a crash would."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
