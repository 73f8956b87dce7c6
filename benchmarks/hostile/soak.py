"""The soak: attackers and ordinary users together, for as long as asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.hostile import data
from benchmarks.hostile.account import Account
from benchmarks.hostile.attacks import attacks
from benchmarks.hostile.processes import AttackerProcess, OrdinaryProcess
from benchmarks.hostile.run import RESULTS, keep_logs, run_folder, store_accounts, wait_for_index
from benchmarks.hostile.server import Cores, HostileServer, new_key, serving
from benchmarks.load_generator import BenchError

_USERS = 6
_ATTACKS = 300
"""Attacks of the list. Each third of the time begins it again, so that the thirds are alike."""
_WARM_UP_SHARE = 0.5
"""Time of attacks before the memory is measured, as a share of the length of the soak. Within
a quarter of an hour the memory rises to what the largest attacks take, and then stays there."""
_PAUSE_S = 3.0
"""Pause between two attacks: the rate of the attacks is moderate."""
_SAMPLE_INTERVAL_S = 1.0
MAX_GROWTH = 0.05
"""Limit of the growth of the mean memory from the first third of the time to the last one."""
_MIN_CALLS = 100


@dataclass
class SoakResult:
    """The measurements of a soak."""

    memory_mib: list[float] = field(default_factory=list)
    """The service's resident memory, once a second."""
    attacks: int = 0
    tally: dict[str, int] = field(default_factory=dict)
    """The attackers' calls by status."""
    ordinary: dict[str, Any] = field(default_factory=dict)
    """The result of the ordinary users' process."""

    @property
    def thirds_mib(self) -> tuple[float, float]:
        """Mean memory in the first and in the last third of the time."""
        third = max(len(self.memory_mib) // 3, 1)
        return mean(self.memory_mib[:third]), mean(self.memory_mib[-third:])

    @property
    def growth(self) -> float:
        """Relative change of the memory from the first third to the last one."""
        first, last = self.thirds_mib
        return last / first - 1

    def problems(self, budget_mib: float) -> list[str]:
        """Return the broken bounds, each as a phrase."""
        problems = []
        if self.growth > MAX_GROWTH:
            problems.append(f"memory grew by {self.growth:+.1%}")
        if (peak_mib := max(self.memory_mib)) > budget_mib:
            problems.append(f"memory reached {peak_mib:.0f} MiB")
        if self.ordinary["calls"] < _MIN_CALLS:
            problems.append("ordinary users made too few calls")
        problems += [f"{name} x{count}" for name, count in self.ordinary["failures"].items()]
        problems += self.ordinary["problems"][:10]
        return problems

    def lines(self, budget_mib: float) -> list[str]:
        """Return the report."""
        first, last = self.thirds_mib
        ordinary = self.ordinary
        problems = self.problems(budget_mib)
        attacks = (
            f"{len(self.memory_mib)} s, {self.attacks} attacks with {sum(self.tally.values()):,} "
            "calls, connections and frames"
        )
        users = (
            f"ordinary users: {ordinary['calls']:,} calls, p99 {ordinary['p99_ms']} ms, slowest "
            f"{ordinary['max_ms']} ms, {sum(ordinary['failures'].values())} failed; "
            f"{ordinary['messages']:,} messages in {ordinary['sessions']} sessions, "
            f"{ordinary['watched']:,} watched"
        )
        memory = (
            f"memory: first third {first:.0f} MiB, last third {last:.0f} MiB "
            f"({self.growth:+.1%}), at most {max(self.memory_mib):.0f} MiB"
        )
        return [attacks, users, memory, "problems: " + ("; ".join(problems) or "none")]


async def soak(
    seconds: float, seed: int, attack_s: float, scale: float, say: Callable[[str], None]
) -> SoakResult:
    """Run attacks and ordinary users together, on a service with default settings.

    Args:
        seconds: Length of the soak, without the warm-up.
        seed: Determines the attacks.
        attack_s: Length of an attack.
        scale: Share of the attacker's large data.
        say: Prints progress.
    """
    cores, key, result = Cores.of_this_machine(), new_key(), SoakResult()
    async with run_folder() as folder, serving(folder, key, is_search_on=True) as server:
        try:
            say("storing the data")
            attacker, _ = await store_accounts(server, key, scale)
            await data.store_remaining(attacker, scale)
            users = [data.new_account(server.address, key) for _ in range(_USERS)]
            for user in users:
                await data.store(user, is_attacker=False)
            await wait_for_index(server)
            ordinary = await OrdinaryProcess.start(users, cores, folder)
            attacks_in_turn = _Attacks(server, attacker, cores, folder, seed, attack_s, result)
            say("warming up")
            await attacks_in_turn.run(_WARM_UP_SHARE * seconds)
            sampler = asyncio.create_task(_sample(server, result.memory_mib))
            for third in ("first", "second", "last"):
                await attacks_in_turn.run(seconds / 3)
                say(f"{third} third: {result.attacks} attacks, {result.memory_mib[-1]:.0f} MiB")
            sampler.cancel()
            result.ordinary = await ordinary.end()
        finally:
            keep_logs(folder)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(result.__dict__, indent=1) + "\n")
    return result


@dataclass
class _Attacks:
    """Runs attacks one after the other, with pauses."""

    server: HostileServer
    account: Account
    cores: Cores | None
    folder: Path
    seed: int
    attack_s: float
    result: SoakResult

    async def run(self, seconds: float) -> None:
        """Run the list of attacks from its beginning, again and again."""
        deadline = time.monotonic() + seconds
        drawn = sorted(attacks(self.seed, _ATTACKS), key=lambda attack: attack.number)
        for attack in cycle(drawn):
            if time.monotonic() >= deadline:
                return
            self.server.pin(self.cores)
            process = await AttackerProcess.start(self.cores, self.folder)
            await process.prepare(self.account, attack)
            for status, count in (await process.attack(self.attack_s)).items():
                self.result.tally[status] = self.result.tally.get(status, 0) + count
            self.result.attacks += 1
            if not self.server.is_running:
                raise BenchError(f"the service ended during {attack}")
            await asyncio.sleep(_PAUSE_S)


async def _sample(server: HostileServer, memory_mib: list[float]) -> None:
    while True:
        memory_mib.append(server.resident_mib())
        await asyncio.sleep(_SAMPLE_INTERVAL_S)
