"""The soak itself: rounds of load under faults, each judged when it is over and once more a round later, and an idle time at the end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.soak import calm
from tests.soak.faults import TERMINATE, Faults
from tests.soak.stack import Replica, Stack
from tests.soak.tally import Outage, Sample, Tally, growth
from tests.soak.traffic import Hopeless, Traffic
from tests.support.chat import Chat
from tests.support.cluster import fetch, wait_until_idle
from tests.support.history import read_history
from tests.support.record import judge
from tests.support.servers import channel
from tests.support.statements import SentStatements

RECOVERY_SECONDS = 60.0
"""Within which a replica must acknowledge again, without anybody's help."""
SETTLE_SECONDS = 6.0
"""After the last call, until what was given up has come to its deadline."""
SAMPLE_SECONDS = 1.0

TWICE = "SELECT count(*) - count(DISTINCT (user_id, id)) FROM chat_messages"
SESSIONS = "SELECT user_id::text, id::text FROM chat_sessions"
LOG_ALL = (
    "ALTER SYSTEM SET log_statement = 'all'",
    "ALTER SYSTEM SET log_line_prefix = '<%a|%d> '",
    "SELECT pg_reload_conf()",
)

Tell = Callable[[str], None]
"""Is told what goes on just now."""


class Soak:
    """One soak of one stack."""

    def __init__(self, stack: Stack, seed: int, tell: Tell) -> None:
        self.stack = stack
        self.tally = Tally()
        self._seed = seed
        self._tell = tell
        self.faults = Faults(stack, random.Random(f"{seed} faults"))
        self._chance = random.Random(f"{seed} pauses")
        self._before: Traffic | None = None

    async def run(self, rounds: int, round_seconds: float) -> None:
        """Soak for so many rounds, and judge them."""
        sampling = asyncio.create_task(self._sample())
        try:
            for number in range(1, rounds + 1):
                traffic = Traffic(self.stack, self.tally, f"{self._seed} traffic {number}")
                async with traffic.running():
                    await self._break_things(time.monotonic() + round_seconds)
                self._tell("judging")
                await self._settle()
                self._look_at_memory(at_rest=True)
                await calm.look(self.stack, self.tally)
                await self._judge(traffic)
                await self._end_round_before(traffic)
        except* Hopeless:
            self._tell("given up")
        finally:
            sampling.cancel()
            await asyncio.wait([sampling])
        self._verdict_on_memory()

    async def _break_things(self, until: float) -> None:
        """One fault after the other; each is over, and recovered from, before the next."""
        while time.monotonic() < until:
            self._tell("all is well")
            await asyncio.sleep(self._chance.uniform(0.5, 3))
            kind, fault = self.faults.draw()
            self._tell(kind)
            began, failed = time.monotonic(), self.tally.failed
            hit = await fault()
            outage = Outage(kind, began, time.monotonic())
            self.tally.outages.append(outage)
            self._tell(f"recovering from: {kind}")
            await self._recover(outage, hit)
            outage.errors = self.tally.failed - failed

    async def _recover(self, outage: Outage, hit: list[Replica]) -> None:
        heard = self.tally.last_acknowledged
        give_up = outage.ended + RECOVERY_SECONDS
        waiting = {replica.name for replica in hit}
        while waiting:
            waiting = {name for name in waiting if heard.get(name, 0.0) <= outage.ended}
            if time.monotonic() > give_up:
                self.tally.blame(
                    "STUCK",
                    f"{outage.kind}: {sorted(waiting)} did not recover in {RECOVERY_SECONDS:.0f} s",
                )
                return
            await asyncio.sleep(0.002)
        outage.recovered = time.monotonic()

    async def _settle(self) -> None:
        """Wait until nothing is under way any more, of what was given up either."""
        await asyncio.sleep(SETTLE_SECONDS)
        await wait_until_idle(self.stack.database_url)

    async def _judge(self, traffic: Traffic) -> int:
        rows = 0
        for record in traffic.records:
            found = await read_history(self.stack.database_url, record.user_id, record.session_id)
            self.tally.problems += judge(record, found)
            rows += len(found.messages) if found else 0
        return rows

    async def _end_round_before(self, traffic: Traffic) -> None:
        """Look once more at the round before, which has gone through another round of faults, and erase it."""
        before, self._before = self._before, traffic
        known = {(record.user_id, record.session_id) for record in traffic.records}
        self.tally.checked += await self._rows(traffic)
        self.tally.views += sum(len(record.views) for record in traffic.records)
        if before is not None:
            await self._judge(before)
            known |= {(record.user_id, record.session_id) for record in before.records}
        [[twice]] = await fetch(self.stack.database_url, TWICE)
        if twice:
            self.tally.blame("DOUBLED", f"{twice} messages are stored more than once")
        there = {(row[0], row[1]) for row in await fetch(self.stack.database_url, SESSIONS)}
        if strange := there - known:
            self.tally.blame(
                "STRANGE", f"sessions that nobody started, or that were erased: {sorted(strange)}"
            )
        if before is not None:
            await before.erase()

    async def _rows(self, traffic: Traffic) -> int:
        users = list({record.user_id for record in traffic.records})
        [[count]] = await fetch(
            self.stack.database_url,
            "SELECT count(*) FROM chat_messages WHERE user_id = ANY($1::uuid[])",
            users,
        )
        return int(count)

    # --- Memory.

    async def _sample(self) -> None:
        while True:
            self._look_at_memory()
            await asyncio.sleep(SAMPLE_SECONDS)

    def _look_at_memory(self, *, at_rest: bool = False) -> None:
        for replica in self.stack.replicas:
            mib = replica.rss_mib
            if mib:  # A process that is about to end has none.
                acknowledged = self.tally.acknowledged
                sample = Sample(
                    self.tally.seconds,
                    replica.name,
                    replica.process.pid,
                    mib,
                    acknowledged,
                    at_rest,
                )
                self.tally.samples.append(sample)

    def _verdict_on_memory(self) -> None:
        for replica in self.stack.replicas:
            if replica.spared:
                samples = [
                    sample for sample in self.tally.samples if sample.replica == replica.name
                ]
                if len({sample.pid for sample in samples}) != 1:
                    self.tally.blame(
                        "STUCK", f"the {replica.name} replica was to run through and did not"
                    )
                grown = growth(samples)
                if grown is not None and grown > self.tally.allowed_growth:
                    self.tally.blame(
                        "MEMORY", f"the {replica.name} replica grew by {grown:.1f} MiB"
                    )

    # --- Idle.

    async def idle(self, minutes: float) -> None:
        """Leave both replicas alone but for probes, and count what PostgreSQL is sent; then end all backends and call."""
        for statement in LOG_ALL:
            await fetch(self.stack.database_url, statement)
        await asyncio.sleep(5)  # Connections that were used go back to the pool by then.
        sent = SentStatements(self.stack.cluster, self.stack.database_url)
        until = time.monotonic() + minutes * 60
        while (left := until - time.monotonic()) > 0:
            self._tell(f"idle for another {left:.0f} s")
            for replica in self.stack.replicas:
                async with channel(replica.front.address) as opened:
                    health: Any = health_pb2_grpc.HealthStub(opened)
                    for name in ("", "liveness", "chathistory.v1.ChatHistoryService"):
                        reply = await health.Check(
                            health_pb2.HealthCheckRequest(service=name), timeout=5
                        )
                        self.tally.probes += 1
                        if reply.status != health_pb2.HealthCheckResponse.SERVING:
                            self.tally.blame("IDLE", f"an idle service is not ready: {name!r}")
            await asyncio.sleep(min(1.0, left))
        self.tally.idle_statements = len(sent.so_far())
        if self.tally.idle_statements:
            self.tally.blame(
                "IDLE",
                f"an idle service asked the database: {[each.sql for each in sent.so_far()][:5]}",
            )
        await self._call_after_suspend(sent)

    async def _call_after_suspend(self, sent: SentStatements) -> None:
        for replica in self.stack.replicas:
            await fetch(self.stack.database_url, TERMINATE)
            async with channel(replica.front.address) as opened:
                try:
                    chat = await Chat.of_new_user(ChatHistoryServiceStub(opened))
                    await fetch(self.stack.database_url, TERMINATE)
                    session_id = await chat.start()
                    await fetch(self.stack.database_url, TERMINATE)
                    await chat.context(session_id)
                except aio.AioRpcError as error:
                    self.tally.failure("the first call after all backends had ended", error)
                    self.tally.blame(
                        "IDLE", f"the first call failed: {error.code().name} {error.details()}"
                    )
        if not sent.so_far():
            self.tally.blame("IDLE", "nothing was counted, not even calls")


async def logs_of(stack: Stack, tally: Tally) -> None:
    """Look for what the service should never have to write down."""
    for replica in stack.replicas:
        with suppress(FileNotFoundError):
            for line in replica.process.log.read_text().splitlines():
                if "internal error" in line or "Traceback" in line:
                    tally.blame("ERROR", f"the log of the {replica.name} replica: {line[:500]}")
