"""Measures the other user under one attack after the other."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc import aio

from benchmarks.environment import WORK_DIR
from benchmarks.hostile import data
from benchmarks.hostile.account import Account
from benchmarks.hostile.attacks import Attack
from benchmarks.hostile.calls import CHANNEL_OPTIONS, call
from benchmarks.hostile.matrix import BASE_REQUESTS
from benchmarks.hostile.outcome import Outcome, Quiet, quantile_ms
from benchmarks.hostile.processes import AttackerProcess, ProbeProcess
from benchmarks.hostile.server import Cores, HostileServer, log_events, new_key, serving
from benchmarks.load_generator import BenchError

RESULTS = WORK_DIR / "hostile"
_QUIET_SECONDS = 6.0
_LEAD_S = 0.1
"""Time that is measured before an attack begins."""
_TAIL_S = 0.25
"""Time that is measured after an attack: its requests may still be in the service. Calls that the
other user makes in this time are measured to their end. More of it would hide the attack: p99 is
taken of all calls."""
_MIN_TAIL_S = 0.1
"""The same after the end of the attacker's process."""
_CALM_TIMEOUT_S = 30.0
_CALM_INTERVAL_S = 0.1
_INDEX_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Plan:
    """The extent of a run."""

    attacks: Sequence[Attack]
    seconds: float
    """Length of an attack."""
    scale: float
    """Share of the large data."""


Report = Callable[[Outcome, Quiet], None]


@asynccontextmanager
async def run_folder() -> AsyncIterator[Path]:
    """Yield a folder of this run, which is removed afterwards."""
    WORK_DIR.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="hostile-", dir=WORK_DIR))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def run(plan: Plan, report: Report, say: Callable[[str], None]) -> Quiet:
    """Run all attacks: those with search on one server, the others on a second one.

    Those with search come first, so that only the stored data has to be indexed, and not what the
    other attacks have written.

    Args:
        plan: The attacks.
        report: Called after each attack.
        say: Prints progress.

    Returns:
        The quiet measurements of the first phase.
    """
    cores = Cores.of_this_machine()
    if cores is None:
        say("processes cannot be pinned here: the figures contain the attacker's own work")
    key = new_key()
    first_quiet: Quiet | None = None
    async with run_folder() as folder:
        accounts: tuple[Account, Account] | None = None
        for is_search_on in (True, False):
            attacks = [attack for attack in plan.attacks if attack.needs_search is is_search_on]
            if not attacks:
                continue
            async with serving(folder, key, is_search_on=is_search_on) as server:
                if accounts is None:
                    say("storing the data")
                    accounts = await store_accounts(server, key, plan.scale)
                for account in accounts:
                    account.address = server.address
                if is_search_on:
                    say("waiting for the index")
                    if not await wait_for_index(server):
                        say("the index is still being built")
                else:
                    await data.store_remaining(accounts[0], plan.scale)
                phase = Phase(server, cores, folder, accounts)
                quiet = await phase.run(attacks, plan.seconds, report, say)
                first_quiet = first_quiet or quiet
        keep_logs(folder)
    if first_quiet is None:
        raise BenchError("there is no attack to run")
    return first_quiet


async def store_accounts(server: HostileServer, key: str, scale: float) -> tuple[Account, Account]:
    """Store the attacker and the other user."""
    attacker = data.new_account(server.address, key)
    other = data.new_account(server.address, key)
    await data.store(other, is_attacker=False)
    await data.store(attacker, is_attacker=True, scale=scale)
    return attacker, other


async def wait_for_index(server: HostileServer) -> bool:
    """Wait until everything stored is indexed, as in production; False if it takes too long."""
    deadline = time.monotonic() + _INDEX_TIMEOUT_S
    while time.monotonic() < deadline:
        gauges = await server.gauges()
        if gauges.get("search_ready") and not gauges.get("search_waiting", 1):
            return True
        await asyncio.sleep(0.5)
    return False


def keep_logs(folder: Path) -> None:
    """Copy the logs of a run to the folder of results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.log"):
        shutil.copy(path, RESULTS / path.name)


class Phase:
    """Attacks on one server."""

    def __init__(
        self,
        server: HostileServer,
        cores: Cores | None,
        folder: Path,
        accounts: tuple[Account, Account],
    ) -> None:
        self._server = server
        self._cores = cores
        self._folder = folder
        self._attacker, self._other = accounts
        self._log = folder / "server.log"

    async def run(
        self,
        attacks: Sequence[Attack],
        seconds: float,
        report: Report,
        say: Callable[[str], None],
    ) -> Quiet:
        """Measure without an attack, and then during each."""
        is_search_on = attacks[0].needs_search
        probe = await ProbeProcess.start(
            self._other, self._cores, self._folder, is_search_on=is_search_on
        )
        standby = await AttackerProcess.start(self._cores, self._folder)
        try:
            quiet = await self._measure_quiet(probe, say)
            say(
                f"search {'on' if is_search_on else 'off'}, without an attack: "
                f"append p99 {quiet.append_p99_ms:.1f} ms, read p99 {quiet.read_p99_ms:.1f} ms, "
                f"{quiet.resident_mib:.0f} MiB"
            )
            for attack in attacks:
                outcome, standby = await self._measure(attack, standby, probe, seconds)
                report(outcome, quiet)
                if not self._server.is_running:
                    raise BenchError(f"the service ended during {attack}")
        finally:
            await probe.stop()
            await standby.stop()
        return quiet

    async def _measure_quiet(self, probe: ProbeProcess, say: Callable[[str], None]) -> Quiet:
        self._server.pin(self._cores)
        # The first calls open connections and fill caches.
        await self._measure_alone(probe, 1.0)
        result = await self._measure_alone(probe, _QUIET_SECONDS)
        if result["failures"]:
            say(f"calls failed without an attack: {result['failures'][:3]}")
        return Quiet(
            quantile_ms(result["durations_s"]["append"], 0.99),
            quantile_ms(result["durations_s"]["read"], 0.99),
            self._server.resident_mib(),
        )

    @staticmethod
    async def _measure_alone(probe: ProbeProcess, seconds: float) -> dict[str, Any]:
        probe.begin()
        await asyncio.sleep(seconds)
        return await probe.end()

    async def _measure(
        self, attack: Attack, attacker: AttackerProcess, probe: ProbeProcess, seconds: float
    ) -> tuple[Outcome, AttackerProcess]:
        """Measure during an attack; also return a process for the next one."""
        server = self._server
        server.pin(self._cores)
        log_start = self._log.stat().st_size
        await attacker.prepare(self._attacker, attack)
        await self._wait_until_calm()
        server.reset_peak()
        probe.begin()
        await asyncio.sleep(_LEAD_S)
        memory = asyncio.create_task(self._other_memory(seconds))
        ends_at = time.monotonic() + seconds
        tally = await attacker.attack(seconds)
        # It loads its modules while nothing is attacked, and not during the next attack.
        standby = await AttackerProcess.start(self._cores, self._folder)
        await asyncio.sleep(max(ends_at + _TAIL_S - time.monotonic(), _MIN_TAIL_S))
        result = await probe.end()
        peak_mib = server.peak_mib()
        postgres_mib, search_mib = await memory
        is_calm = await self._wait_until_calm()
        outcome = Outcome(
            attack,
            result["durations_s"],
            result["failures"],
            peak_mib,
            server.resident_mib(),
            is_calm,
            tally,
            postgres_mib,
            search_mib,
            log_events(self._log, log_start),
            server.is_running,
        )
        return outcome, standby

    async def _other_memory(self, seconds: float) -> tuple[float, float]:
        """Return the memory of the other processes towards the end of an attack."""
        await asyncio.sleep(0.8 * seconds)
        return await asyncio.to_thread(self._server.other_memory_mib)

    async def _wait_until_calm(self) -> bool:
        deadline = time.monotonic() + _CALM_TIMEOUT_S
        while time.monotonic() < deadline and self._server.is_running:
            if await self._server.is_calm() and await self._has_empty_queues():
                return True
            await asyncio.sleep(_CALM_INTERVAL_S)
        return False

    async def _has_empty_queues(self) -> bool:
        """Return once calls pass the queues in which gRPC keeps calls before the service sees them.

        Calls of an attack that was cut off may still be in them, and no gauge counts those.
        """
        account = self._other
        async with aio.insecure_channel(account.address, options=CHANNEL_OPTIONS) as channel:
            for rpc, body in (
                # These are rejected, and do nothing.
                ("AppendMessages", b""),
                ("GetContext", b""),
                ("ListMessages", b""),
                ("GetUser", BASE_REQUESTS["GetUser"](account).SerializeToString()),
            ):
                status = await call(channel, rpc, body, account.metadata(), _CALM_TIMEOUT_S)
                if status != "OK" and not status.startswith("INVALID_ARGUMENT"):
                    return False
        return True


def save(name: str, results: Sequence[dict[str, Any]], quiet: Quiet) -> None:
    """Write all results into a file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"quiet": quiet.__dict__, "attacks": results})
    (RESULTS / f"{name}.json").write_text(text + "\n")
