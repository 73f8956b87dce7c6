"""Rounds of failover under load: switchovers and kills of the primary by Patroni, and figures."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import asyncpg
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub

from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.rpc.test_health import Probe
from tests.support import pgbouncer
from tests.support.chat import Chat
from tests.support.cluster import TESTS_APPLICATION, fetch
from tests.support.failover_load import (
    Clients,
    HealthLog,
    longest_error_s,
    longest_pause,
)
from tests.support.history import read_history
from tests.support.load import fast_reconnect_options
from tests.support.patroni import DATABASE, USER, PatroniCluster, PatroniNode
from tests.support.pgbouncer import PgBouncer
from tests.support.record import Problem, judge
from tests.support.servers import ServerProcess, channel

RECOVERY_TIMEOUT_S = 60.0
APPENDS_BETWEEN_FAULTS = 60
POLL_INTERVAL_S = 0.05
TOLERATED = {
    # A failover removes a message that was not acknowledged; a reader may have seen it before.
    True: frozenset({"VIEW"}),
    # A failover loses what the standby had not received, also for readers that have seen it.
    False: frozenset({"LOST", "VIEW", "STALE"}),
}
"""Kinds of problems that are no defect of the service, by whether replication is synchronous."""

_TIMELINE = "SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"
_WRITE = "SELECT pg_logical_emit_message(true, 'test', '')"
_STATE = "SELECT pg_is_in_recovery(), pg_postmaster_start_time() > $1"

Fault = Callable[[PatroniCluster, PatroniNode], None]
"""Makes a cluster replace its leader."""
FAULTS: dict[str, Fault] = {
    "switchover": PatroniCluster.switch_over,
    "PostgreSQL killed (-9)": lambda _cluster, leader: leader.kill_postgres(),
    "node killed (-9)": lambda _cluster, leader: leader.kill(),
}
Route = Callable[[PatroniCluster, AsyncExitStack], Awaitable[str]]
"""Returns the connection string of the service, and starts what it leads through."""


class Round(NamedTuple):
    """One switchover or kill. All times are seconds."""

    kind: str
    accepted_s: float
    """From the fault to the first commit of a new primary, by a connection of the test's own."""
    paused_s: float
    """The longest time without an acknowledgement."""
    recovered_s: float
    """From that commit to the next acknowledgement."""
    wrong_health_s: float
    """How long health was SERVING in the outage, or NOT_SERVING after it; the longer of the two."""
    errors: Counter[str]
    """Failed calls, by reason."""

    def __str__(self) -> str:
        errors = ", ".join(f"{count} {name}" for name, count in self.errors.items()) or "none"
        return (
            f"{self.kind}: new primary after {self.accepted_s:.2f} s, appends paused for "
            f"{self.paused_s:.2f} s and recovered after {self.recovered_s:.2f} s, health wrong for "
            f"{self.wrong_health_s:.2f} s, failed calls: {errors}"
        )


class Figures(NamedTuple):
    """The result of some rounds."""

    rounds: list[Round]
    acknowledged: int
    """Acknowledged messages."""
    views: int
    problems: list[Problem]
    is_synchronous: bool

    def count(self, kind: str) -> int:
        """Return the number of problems of a kind."""
        return sum(problem.kind == kind for problem in self.problems)

    @property
    def defects(self) -> list[Problem]:
        """The problems that must not occur."""
        tolerated = TOLERATED[self.is_synchronous]
        return [problem for problem in self.problems if problem.kind not in tolerated]

    @property
    def errors(self) -> Counter[str]:
        """Failed calls of all rounds, by reason."""
        return sum((completed.errors for completed in self.rounds), Counter[str]())


class _Run:
    """A service, its clients, and the rounds that they go through."""

    def __init__(
        self,
        cluster: PatroniCluster,
        clients: Clients,
        health: HealthLog,
        on_round: Callable[[Round], None],
    ) -> None:
        self._cluster = cluster
        self._clients = clients
        self._health = health
        self._on_round = on_round

    async def run(self, kind: str) -> Round:
        """Replace the leader, and wait until all nodes run again."""
        cluster, clients = self._cluster, self._clients
        leader = await asyncio.to_thread(cluster.wait_healthy)
        await clients.wait_for_appends(APPENDS_BETWEEN_FAULTS, RECOVERY_TIMEOUT_S)
        [[timeline]] = await fetch(leader.url(), _TIMELINE)
        clients.errors.clear()
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(wait_writable(cluster, timeline, began))
            await asyncio.to_thread(FAULTS[kind], cluster, leader)
        accepted = waiting.result()
        acknowledged = await clients.first_acknowledgement(accepted, RECOVERY_TIMEOUT_S)
        await self._health.wait_serving(RECOVERY_TIMEOUT_S)
        errors = clients.errors.copy()
        if not leader.is_running:
            leader.start()
        await asyncio.to_thread(cluster.wait_healthy)
        await self._health.wait_serving(RECOVERY_TIMEOUT_S)
        paused_at, resumed_at = longest_pause(clients.acknowledged_at, began, acknowledged)
        completed = Round(
            kind,
            accepted - began,
            resumed_at - paused_at,
            acknowledged - accepted,
            longest_error_s(self._health.changes, paused_at, accepted),
            errors,
        )
        self._on_round(completed)
        return completed


async def wait_writable(cluster: PatroniCluster, timeline: int, since: float) -> float:
    """Wait until a node of a newer timeline, or one that has started since, commits a write.

    Returns:
        The time of the commit, on the monotonic clock.
    """
    polls = [asyncio.create_task(_poll(node, timeline, since)) for node in cluster.nodes]
    try:
        async with asyncio.timeout(RECOVERY_TIMEOUT_S):
            done, _ = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
        return min(task.result() for task in done)
    finally:
        for task in polls:
            task.cancel()
        await asyncio.wait(polls)


async def _poll(node: PatroniNode, timeline: int, since: float) -> float:
    began_at = datetime.now(UTC) - timedelta(seconds=time.monotonic() - since)
    while True:
        with suppress(*DATABASE_ERRORS):
            if await _commits(node, timeline, began_at):
                return time.monotonic()
        await asyncio.sleep(POLL_INTERVAL_S)


async def _commits(node: PatroniNode, timeline: int, began_at: datetime) -> bool:
    connection = await asyncpg.connect(
        node.url(),
        timeout=1,
        statement_cache_size=0,
        server_settings={"application_name": TESTS_APPLICATION},
    )
    try:
        [(is_standby, has_restarted)] = await connection.fetch(_STATE, began_at)
        if is_standby or not (has_restarted or await connection.fetchval(_TIMELINE) > timeline):
            return False
        await connection.execute(_WRITE)
        return True
    finally:
        connection.terminate()


async def direct(cluster: PatroniCluster, _exits: AsyncExitStack) -> str:
    """Connect to the nodes themselves."""
    return cluster.url()


async def pooled(cluster: PatroniCluster, exits: AsyncExitStack) -> str:
    """Connect through a PgBouncer for each node; the connection string names all of them."""
    settings = {"server_connect_timeout": "2", "query_wait_timeout": "5"}
    poolers = [
        exits.enter_context(
            PgBouncer(f"postgresql://{USER}@/{DATABASE}?host=127.0.0.1&port={node.port}", settings)
        )
        for node in cluster.nodes
    ]
    hosts = ",".join(f"127.0.0.1:{pooler.port}" for pooler in poolers)
    return (
        f"postgresql://{USER}:{pgbouncer.PASSWORD}@{hosts}/{DATABASE}"
        "?sslmode=disable&pgbouncer=true&target_session_attrs=read-write"
    )


async def fail_over(
    cluster: PatroniCluster,
    route: Route,
    folder: Path,
    *,
    rounds: int,
    seed: int,
    on_round: Callable[[Round], None] = print,
) -> Figures:
    """Run rounds under load, each kind of fault as often as any other, and judge the stored rows.

    Args:
        cluster: The nodes, which have no database for the service yet.
        route: How the service connects to them.
        folder: Working folder of the service.
        rounds: Number of faults.
        seed: Determines their order.
        on_round: Called after each round.
    """
    kinds = [list(FAULTS)[number % len(FAULTS)] for number in range(rounds)]
    random.Random(seed).shuffle(kinds)
    leader = await asyncio.to_thread(cluster.wait_healthy)
    await fetch(leader.url("postgres"), f"CREATE ROLE {USER} LOGIN")
    await fetch(leader.url("postgres"), f"CREATE DATABASE {DATABASE} OWNER {USER}")
    await migrations.upgrade(parse(cluster.url()))
    async with AsyncExitStack() as exits:
        url = await route(cluster, exits)
        # At its end it must exit with code 0: no fault may end it.
        server = await exits.enter_async_context(ServerProcess(url, folder))
        opened = await exits.enter_async_context(
            channel(server.address, **fast_reconnect_options())
        )
        clients = Clients(await Chat.of_new_user(ChatHistoryServiceStub(opened)), seed)
        health = HealthLog(Probe(opened))
        run = _Run(cluster, clients, health, on_round)
        async with health.running(), clients.running():
            results = [await run.run(kind) for kind in kinds]
    leader = await asyncio.to_thread(cluster.wait_healthy)
    problems: list[Problem] = []
    for record in clients.records:
        stored = await read_history(leader.url(), record.user_id, record.session_id)
        problems += judge(record, stored)
    return Figures(
        results,
        sum(record.acknowledged for record in clients.records),
        sum(len(record.views) for record in clients.records),
        problems,
        cluster.is_synchronous,
    )


def table(rounds: list[Round]) -> str:
    """Return the figures of each kind of fault as a table in Markdown."""
    heads = (
        "fault | times | new primary, median s | appends paused, median s | recovery, median s "
        "| max s | health wrong, max s | failed calls, median"
    )
    lines = [f"| {heads} |", "| -- | -: | -: | -: | -: | -: | -: | -: |"]
    for kind in FAULTS:
        those = [completed for completed in rounds if completed.kind == kind]
        if those:
            lines.append(
                f"| {kind} | {len(those)} "
                f"| {statistics.median(item.accepted_s for item in those):.1f} "
                f"| {statistics.median(item.paused_s for item in those):.1f} "
                f"| {statistics.median(item.recovered_s for item in those):.2f} "
                f"| {max(item.recovered_s for item in those):.2f} "
                f"| {max(item.wrong_health_s for item in those):.2f} "
                f"| {statistics.median(item.errors.total() for item in those):.0f} |"
            )
    return "\n".join(lines)
