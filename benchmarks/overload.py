"""The overload benchmark: goodput, refusals and health checks at four times the peak load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from benchmarks import workload
from benchmarks.bench import Bench
from benchmarks.environment import Server
from benchmarks.load_generator import Load, LoadResult, generate_load
from benchmarks.table import Table
from benchmarks.workload import Session
from service.config import Settings
from service.rpc.health import SERVICE

CONNECTIONS = 16
PROBE_INTERVAL_S = 0.05
"""Pause between two health checks."""
OVERLOAD_FACTOR = 4
"""The overload as a multiple of the service's limit of calls, or of its peak rate."""
_MAX_OPEN_CALLS = 30_000
"""Maximum unanswered calls of an open loop."""
_BODIES_PER_SECOND = 14_000
"""More calls than the service answers or refuses in a second."""


@dataclass(frozen=True)
class Phase:
    """The measurements under one load."""

    name: str
    result: LoadResult
    health_s: list[float]
    """Durations of the health checks, sorted."""

    @property
    def goodput(self) -> float:
        """Calls per second that were answered with OK."""
        return self.result.replies / self.result.seconds


async def overload(bench: Bench) -> list[Phase]:
    """Load the service up to its limit, then with four times as much in three ways.

    A light load is measured before, and again after each overload.
    """
    limit = Settings.model_fields["max_in_flight"].default
    sessions = workload.new_sessions(800, per_user=1)
    await bench.environment.new_database("overload")
    async with bench.environment.connect("overload") as connection:
        await workload.seed(connection, sessions)
    light = Load(64, bench.plan.seconds, bench.plan.warmup)
    peak = replace(light, in_flight=limit // 4, connections=CONNECTIONS)
    excessive = replace(
        peak,
        in_flight=OVERLOAD_FACTOR * limit,
        seconds=2 * light.seconds,
        warmup=3 * light.warmup,
        honors_retry_info=True,
        allows_refusals=True,
    )
    phases: list[Phase] = []
    async with bench.environment.service("overload") as service:

        async def run_phase(name: str, load: Load) -> Phase:
            phases.append(await _run_phase(bench, service, sessions, name, load))
            return phases[-1]

        await run_phase("64 callers, before", light)
        peaks = [
            await run_phase(f"{count:,} callers", replace(peak, in_flight=count))
            for count in (limit // 4, limit // 2)
        ]
        rate = OVERLOAD_FACTOR * max(phase.goodput for phase in peaks)
        for name, load in (
            (f"{OVERLOAD_FACTOR * limit:,} callers that honor RetryInfo", excessive),
            (
                f"{OVERLOAD_FACTOR * limit:,} callers that retry immediately",
                replace(excessive, honors_retry_info=False),
            ),
            (
                f"{rate:,.0f} calls/s in an open loop",
                replace(excessive, rate=rate, in_flight=_MAX_OPEN_CALLS),
            ),
        ):
            await run_phase(name, load)
            await run_phase("64 callers, immediately afterwards", light)
    acknowledged = sum(phase.result.statuses["0"] for phase in phases)
    await bench.check_rows("overload", acknowledged)
    return phases


async def _run_phase(
    bench: Bench, service: Server, sessions: Sequence[Session], name: str, load: Load
) -> Phase:
    """Measure appends and health checks under one load."""
    bench.progress.expect(1)
    calls_per_second = max(_BODIES_PER_SECOND, 1.1 * load.rate)
    count = int(calls_per_second * (load.seconds + load.warmup)) + load.in_flight
    bodies = workload.append_bodies(sessions, count)(bench.environment.folder)
    async with _probe_health(service) as health_s:
        result = await generate_load(
            bench.environment.load_generator,
            service.address,
            f"/{SERVICE}/AppendMessages",
            bodies,
            load,
        )
    bench.progress.advance()
    return Phase(name, result, sorted(health_s))


@asynccontextmanager
async def _probe_health(service: Server) -> AsyncIterator[list[float]]:
    """Check the service's health during the block and yield the list of durations in seconds."""
    durations_s: list[float] = []

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
                durations_s.append(time.perf_counter() - started)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING  # noqa: S101 - ready under any load
                await asyncio.sleep(PROBE_INTERVAL_S)

    task = asyncio.create_task(probe())
    try:
        yield durations_s
        if task.done():
            await task  # Raises: a probe ends only by failing.
    finally:
        task.cancel()
        await asyncio.wait([task])


def table(phases: list[Phase]) -> Table:
    """Return the table of the phases."""
    peak = max(phase.goodput for phase in phases if phase.result.refused == 0)
    rows = [
        [
            phase.name,
            f"{phase.goodput:,.0f}",
            f"{phase.goodput / peak:.2f}",
            f"{phase.result.refused / phase.result.seconds:,.0f}",
            _grpc_share(phase.result),
            f"{phase.result.p50 / 1000:,.0f}",
            f"{phase.result.p99 / 1000:,.0f}",
            f"{phase.health_s[len(phase.health_s) // 2] * 1000:.0f}",
            f"{phase.health_s[int(len(phase.health_s) * 0.99)] * 1000:.0f}",
            f"{phase.health_s[-1] * 1000:.0f}",
        ]
        for phase in phases
    ]
    columns = (
        "load",
        "answered/s",
        "of the peak",
        "refused/s",
        "by gRPC",
        "p50 ms",
        "p99 ms",
        "health p50 ms",
        "p99 ms",
        "max ms",
    )
    return Table("Overload: AppendMessages, one message per call", columns, rows)


def _grpc_share(result: LoadResult) -> str:
    """Return the share of refusals by gRPC itself, as CANCELLED."""
    by_grpc, by_service = result.statuses.get("1", 0), result.statuses.get("8", 0)
    refusals = by_grpc + by_service
    return f"{by_grpc / refusals:.0%}" if refusals else ""
