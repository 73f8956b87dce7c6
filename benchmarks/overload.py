"""More load than the service can carry: what it still answers, how it refuses the rest, and whether health answers meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from benchmarks import workload
from benchmarks.environment import Server
from benchmarks.load_generator import Load, LoadResult, generate_load
from benchmarks.report import Table
from benchmarks.scenarios import Bench
from service.config import Settings
from service.rpc.health import SERVICE

CONNECTIONS = 16
PROBE_SECONDS = 0.05
"""Between two questions to health."""
TIMES = 4
"""How many times the load that it can carry."""
_MOST_OPEN = 30_000
"""Calls that an open loop leaves unanswered at the most."""
_BODIES_PER_SECOND = 14_000
"""More than are answered or refused."""


@dataclass(frozen=True)
class Phase:
    """What was found under one load."""

    name: str
    answer: LoadResult
    health: list[float]
    """Seconds that each question to health took, sorted."""

    @property
    def goodput(self) -> float:
        """Calls answered well in a second."""
        return self.answer.replies / self.answer.seconds


async def overload(bench: Bench) -> list[Phase]:
    """Load the service with what it can carry, with four times that in three ways, and again with little."""
    limit = Settings.model_fields["max_in_flight"].default
    sessions = workload.new_sessions(800, per_user=1)
    await bench.environment.new_database("overload")
    async with bench.environment.connect("overload") as connection:
        await workload.seed(connection, sessions)
    few = Load(64, bench.plan.seconds, bench.plan.warmup)
    full = replace(few, in_flight=limit // 4, connections=CONNECTIONS)
    many = replace(
        full,
        in_flight=TIMES * limit,
        seconds=2 * few.seconds,
        warmup=3 * few.warmup,
        patient=True,
        refusable=True,
    )
    phases: list[Phase] = []
    async with bench.environment.service("overload") as service:

        async def phase(name: str, load: Load) -> Phase:
            bench.progress.expect(1)
            count = (
                int(max(_BODIES_PER_SECOND, 1.1 * load.rate) * (load.seconds + load.warmup))
                + load.in_flight
            )
            bodies = workload.append_bodies(sessions, count)(bench.environment.folder)
            async with _probe_health(service) as health:
                answer = await generate_load(
                    bench.environment.load_generator,
                    service.address,
                    f"/{SERVICE}/AppendMessages",
                    bodies,
                    load,
                )
            bench.progress.advance()
            phases.append(Phase(name, answer, sorted(health)))
            return phases[-1]

        await phase("64 callers, before", few)
        peaks = [
            await phase(f"{count:,} callers", replace(full, in_flight=count))
            for count in (limit // 4, limit // 2)
        ]
        await phase(f"{TIMES * limit:,} callers who wait as they are told", many)
        await phase("64 callers, at once after that", few)
        await phase(f"{TIMES * limit:,} callers who do not wait", replace(many, patient=False))
        await phase("64 callers, at once after that", few)
        rate = TIMES * max(each.goodput for each in peaks)
        await phase(
            f"{rate:,.0f} calls a second, whatever is answered",
            replace(many, rate=rate, in_flight=_MOST_OPEN),
        )
        await phase("64 callers, at once after that", few)
    acknowledged = sum(each.answer.statuses["0"] for each in phases)
    await bench.check_rows("overload", acknowledged)
    return phases


@asynccontextmanager
async def _probe_health(service: Server) -> AsyncIterator[list[float]]:
    """Ask a service's health again and again during a block; give how many seconds each question took."""
    took: list[float] = []

    async def probe() -> None:
        async with grpc.aio.insecure_channel(service.address) as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            while True:
                started = time.perf_counter()
                reply = await check(health_pb2.HealthCheckRequest(), timeout=10)
                took.append(time.perf_counter() - started)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING  # noqa: S101 - it is ready all the time
                await asyncio.sleep(PROBE_SECONDS)

    probing = asyncio.create_task(probe())
    try:
        yield took
        if probing.done():
            await probing  # It has failed.
    finally:
        probing.cancel()
        await asyncio.wait([probing])


def table(phases: list[Phase]) -> Table:
    """Show what was found."""
    peak = max(each.goodput for each in phases if each.answer.refused == 0)
    rows = [
        [
            each.name,
            f"{each.goodput:,.0f}",
            f"{each.goodput / peak:.2f}",
            f"{each.answer.refused / each.answer.seconds:,.0f}",
            _by_grpc(each.answer),
            f"{each.answer.p50 / 1000:,.0f}",
            f"{each.answer.p99 / 1000:,.0f}",
            f"{each.health[len(each.health) // 2] * 1000:.0f}",
            f"{each.health[int(len(each.health) * 0.99)] * 1000:.0f}",
            f"{each.health[-1] * 1000:.0f}",
        ]
        for each in phases
    ]
    columns = (
        "load", "answered/s", "of the peak", "refused/s", "by gRPC", "p50 ms", "p99 ms", "health p50 ms", "p99 ms", "most ms",
    )  # fmt: skip
    return Table("Overload: AppendMessages, one message a call", columns, rows)


def _by_grpc(answer: LoadResult) -> str:
    """Return the share of refusals that gRPC itself has made, as CANCELLED."""
    own, ours = answer.statuses.get("1", 0), answer.statuses.get("8", 0)
    return f"{own / (own + ours):.0%}" if own + ours else ""
