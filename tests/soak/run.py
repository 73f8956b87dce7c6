"""The soak: rounds of load under faults, and an idle time at the end.

The data of each round is checked when the round is over, and again one round later.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from typing import Any

from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.store.outbox.outbox import MAX_DELAY_S
from tests.soak import checks
from tests.soak.faults import TERMINATE_BACKENDS, Faults
from tests.soak.stack import Replica, Stack
from tests.soak.tally import ALLOWED_NEW_DESCRIPTORS, Outage, Sample, Tally, growth
from tests.soak.traffic import SoakAborted, Traffic
from tests.support.chat import Chat
from tests.support.cluster import fetch, wait_until_idle
from tests.support.history import read_history
from tests.support.record import judge
from tests.support.servers import channel, defects_in
from tests.support.statements import SentStatements

RECOVERY_TIMEOUT_S = 60.0
"""Limit for a replica to acknowledge an append again, without intervention."""
SETTLE_S = 6.0
"""The wait after the last call, during which abandoned calls reach their deadlines."""
SAMPLE_INTERVAL_S = 1.0

COUNT_DUPLICATES = "SELECT count(*) - count(DISTINCT (user_id, id)) FROM chat_messages"
SELECT_SESSIONS = "SELECT user_id::text, id::text FROM chat_sessions"
LOG_ALL = (
    "ALTER SYSTEM SET log_statement = 'all'",
    "ALTER SYSTEM SET log_line_prefix = '<%a|%d> '",
    "SELECT pg_reload_conf()",
)

OnStatus = Callable[[str], None]
"""Called with a description of each step."""


class Soak:
    """One soak of one stack."""

    def __init__(
        self,
        stack: Stack,
        seed: int,
        on_status: OnStatus,
        pause_s: tuple[float, float] = (0.5, 3),
    ) -> None:
        """Take the least and the longest pause before a fault."""
        self.stack = stack
        self._pause_s = pause_s
        self.tally = Tally()
        self._seed = seed
        self._on_status = on_status
        self.faults = Faults(stack, random.Random(f"{seed} faults"))
        self._rng = random.Random(f"{seed} pauses")
        self._previous: Traffic | None = None

    async def run(
        self, rounds: int, *, round_s: float = math.inf, faults: float = math.inf
    ) -> None:
        """Run rounds of load under faults, and check the data of each.

        Args:
            rounds: The number of rounds.
            round_s: Seconds after which a round ends when its last fault is over.
            faults: The number of faults after which a round ends.
        """
        sampling = asyncio.create_task(self._sample())
        try:
            for number in range(1, rounds + 1):
                traffic = Traffic(self.stack, self.tally, f"{self._seed} traffic {number}")
                async with traffic.running():
                    await self._inject_faults(time.monotonic() + round_s, faults)
                self._on_status("checking the data")
                await self._settle()
                self._sample_memory(at_rest=True)
                await checks.check_replicas(self.stack, self.tally)
                await self._judge(traffic)
                await self._finish_previous_round(traffic)
            if self._previous is not None:
                await checks.check_documents(self.stack, self.tally, self._previous.documents)
        except* SoakAborted:
            self._on_status("aborted")
        finally:
            sampling.cancel()
            await asyncio.wait([sampling])
        self._check_memory()

    async def _inject_faults(self, until: float, count: float) -> None:
        """Inject one fault after another, each when the service has recovered from the last one."""
        last = len(self.tally.outages) + count
        while time.monotonic() < until and len(self.tally.outages) < last:
            self._on_status("no fault")
            await asyncio.sleep(self._rng.uniform(*self._pause_s))
            kind, fault = self.faults.draw()
            self._on_status(kind)
            began, failed_before = time.monotonic(), self.tally.failed
            affected = await fault()
            outage = Outage(kind, began, time.monotonic())
            self.tally.outages.append(outage)
            self._on_status(f"recovering from: {kind}")
            await self._wait_for_recovery(outage, affected)
            outage.errors = self.tally.failed - failed_before
            self._on_status(f"restoring the standby after: {kind}")
            await self.faults.repair()

    async def _wait_for_recovery(self, outage: Outage, affected: list[Replica]) -> None:
        works_at = (
            self.tally.last_searched
            if outage.kind in self.faults.of_search
            else self.tally.last_acknowledged
        )
        deadline = outage.ended + RECOVERY_TIMEOUT_S
        waiting = {replica.name for replica in affected}
        while waiting:
            waiting = {name for name in waiting if works_at.get(name, 0.0) <= outage.ended}
            if time.monotonic() > deadline:
                names = ", ".join(sorted(waiting))
                self.tally.add_problem(
                    "STUCK", f"{outage.kind}: no recovery in {RECOVERY_TIMEOUT_S:.0f} s: {names}"
                )
                return
            await asyncio.sleep(0.002)
        outage.recovered = time.monotonic()

    async def _settle(self) -> None:
        """Wait until no call is in flight, not even an abandoned one."""
        await asyncio.sleep(SETTLE_S)
        await wait_until_idle(self.stack.database_url)

    async def _judge(self, traffic: Traffic) -> None:
        for record in traffic.records:
            stored = await read_history(self.stack.database_url, record.user_id, record.session_id)
            self.tally.problems += judge(record, stored)

    async def _finish_previous_round(self, traffic: Traffic) -> None:
        """Check the previous round again, after another round of faults, and delete its users."""
        previous, self._previous = self._previous, traffic
        known = {(record.user_id, record.session_id) for record in traffic.records}
        self.tally.checked += await self._count_messages(traffic)
        self.tally.views += sum(len(record.views) for record in traffic.records)
        if previous is not None:
            await self._judge(previous)
            # Not in its own round: a killed indexer holds its rows for a minute.
            await checks.check_documents(self.stack, self.tally, previous.documents)
            known |= {(record.user_id, record.session_id) for record in previous.records}
        [[duplicates]] = await fetch(self.stack.database_url, COUNT_DUPLICATES)
        if duplicates:
            self.tally.add_problem("DOUBLED", f"{duplicates} messages are stored more than once")
        rows = await fetch(self.stack.database_url, SELECT_SESSIONS)
        if unknown := {(row[0], row[1]) for row in rows} - known:
            self.tally.add_problem(
                "STRANGE", f"sessions that were never created, or deleted: {sorted(unknown)}"
            )
        if previous is not None:
            await previous.delete_users()

    async def _count_messages(self, traffic: Traffic) -> int:
        user_ids = list({record.user_id for record in traffic.records})
        [[count]] = await fetch(
            self.stack.database_url,
            "SELECT count(*) FROM chat_messages WHERE user_id = ANY($1::uuid[])",
            user_ids,
        )
        return int(count)

    # --- Memory.

    async def _sample(self) -> None:
        while True:
            self._sample_memory()
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def _sample_memory(self, *, at_rest: bool = False) -> None:
        for replica in self.stack.replicas:
            mib = replica.rss_mib
            if mib:  # A process that is ending has no resident memory.
                acknowledged = self.tally.acknowledged
                sample = Sample(
                    self.tally.seconds,
                    replica.name,
                    replica.process.pid,
                    mib,
                    acknowledged,
                    at_rest,
                    replica.descriptors,
                )
                self.tally.samples.append(sample)

    def _check_memory(self) -> None:
        for replica in self.stack.replicas:
            if replica.never_killed:
                samples = [
                    sample for sample in self.tally.samples if sample.replica == replica.name
                ]
                if len({sample.pid for sample in samples}) != 1:
                    self.tally.add_problem(
                        "STUCK", f"the {replica.name} replica did not run without a restart"
                    )
                growth_mib = growth(samples)
                if growth_mib is not None and growth_mib > self.tally.allowed_growth_mib:
                    self.tally.add_problem(
                        "MEMORY", f"the {replica.name} replica grew by {growth_mib:.1f} MiB"
                    )
                opened = growth(samples, attrgetter("descriptors"))
                if opened is not None and opened > ALLOWED_NEW_DESCRIPTORS:
                    self.tally.add_problem(
                        "LEAK", f"the {replica.name} replica holds {opened:.0f} more descriptors"
                    )

    # --- Idle.

    async def idle(self, minutes: float) -> None:
        """Send only probes, and count the statements; then terminate all backends and call."""
        for statement in LOG_ALL:
            await fetch(self.stack.database_url, statement)
        await checks.check_outbox(self.stack, self.tally)
        # An indexer looks again for rows that the other replica had leased.
        await asyncio.sleep(MAX_DELAY_S)
        await asyncio.sleep(5)  # Until then all connections have been returned to the pool.
        sent = SentStatements(self.stack.database.primary, self.stack.database_url)
        idle_until = time.monotonic() + minutes * 60
        while (remaining_s := idle_until - time.monotonic()) > 0:
            self._on_status(f"idle for another {remaining_s:.0f} s")
            for replica in self.stack.replicas:
                async with channel(replica.client_proxy.address) as connection:
                    health: Any = health_pb2_grpc.HealthStub(connection)
                    for name in ("", "liveness", "chathistory.v1.ChatHistoryService"):
                        reply = await health.Check(
                            health_pb2.HealthCheckRequest(service=name), timeout=5
                        )
                        self.tally.probes += 1
                        if reply.status != health_pb2.HealthCheckResponse.SERVING:
                            self.tally.add_problem(
                                "IDLE", f"an idle service is not ready: {name!r}"
                            )
            await asyncio.sleep(min(1.0, remaining_s))
        self.tally.idle_statements = len(sent.so_far())
        if self.tally.idle_statements:
            self.tally.add_problem(
                "IDLE",
                "an idle service sent statements: "
                f"{[statement.sql for statement in sent.so_far()][:5]}",
            )
        await self._call_after_suspend(sent)

    async def _call_after_suspend(self, sent: SentStatements) -> None:
        for replica in self.stack.replicas:
            await fetch(self.stack.database_url, TERMINATE_BACKENDS)
            async with channel(replica.client_proxy.address) as connection:
                try:
                    chat = await Chat.of_new_user(ChatHistoryServiceStub(connection))
                    await fetch(self.stack.database_url, TERMINATE_BACKENDS)
                    session_id = await chat.start()
                    await fetch(self.stack.database_url, TERMINATE_BACKENDS)
                    await chat.context(session_id)
                except aio.AioRpcError as error:
                    self.tally.count_failure("the first call after all backends ended", error)
                    self.tally.add_problem(
                        "IDLE", f"the first call failed: {error.code().name} {error.details()}"
                    )
        if not sent.so_far():
            self.tally.add_problem("IDLE", "no statements were counted, not even those of calls")


async def check_logs(stack: Stack, tally: Tally) -> None:
    """Add a problem for every internal error and traceback in the logs."""
    for replica in stack.replicas:
        with suppress(FileNotFoundError):
            for line in replica.process.log.read_text().splitlines():
                if "internal error" in line or defects_in(line):
                    tally.add_problem(
                        "ERROR", f"the log of the {replica.name} replica: {line[:500]}"
                    )
