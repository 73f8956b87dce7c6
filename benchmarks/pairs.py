"""Compares two versions of the service, which are loaded in turn, pair by pair.

Each pair loads both versions within seconds of each other, so that other load on the machine
affects both. The version that goes first changes from pair to pair. The result is the median of the
pairs' ratios, with a lower bound by bootstrap.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks import workload
from benchmarks.comparison import Figures, Subject, measure_once
from benchmarks.environment import ROOT, Environment, Server, source_path
from benchmarks.load_generator import BenchError, Load
from benchmarks.workload import Session

KINDS = ("append", "context", "list")
SESSIONS = 200
MAX_CALLS_PER_SECOND = 12_000
"""More than any version answers. Each append needs a body with new message ids."""
RESAMPLES = 20_000
"""Samples of the bootstrap."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pair:
    """The figures of both versions in one pair."""

    before: Figures
    after: Figures

    @property
    def ratio(self) -> float:
        """Calls per second, after divided by before."""
        return self.after.calls_per_second / self.before.calls_per_second

    @property
    def cpu_ratio(self) -> float:
        """Server CPU time per call, after divided by before; less sensitive to other load."""
        return self.after.cpu_us_per_call / self.before.cpu_us_per_call


def lower_bound(ratios: Sequence[float]) -> float:
    """Return the lower 95% bound of the median, by a bootstrap with a fixed seed."""
    generator = random.Random(1)  # noqa: S311 - statistics
    medians = sorted(median(generator.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[int(RESAMPLES * (1 - CONFIDENCE))]


async def run(
    environment: Environment,
    before: Path,
    kinds: Sequence[str],
    pairs: int,
    load: Load,
    on_step: Callable[[], None],
) -> dict[str, list[Pair]]:
    """Measure `pairs` pairs of each kind of call.

    Args:
        environment: The environment of both versions, each of which has a database of its own.
        before: The source tree of the earlier version.
        kinds: Kinds of calls to measure, some of KINDS.
        pairs: Number of measurements of each version and kind.
        load: The load of one measurement.
        on_step: Called after each measurement.

    Raises:
        BenchError: a call failed, or the rows do not match the acknowledgements.
    """
    if not (before / "service" / "__main__.py").is_file():
        raise BenchError(f"{before} is not a source tree of the service")
    return {kind: await _measure(environment, before, kind, pairs, load, on_step) for kind in kinds}


async def _measure(
    environment: Environment,
    before: Path,
    kind: str,
    pairs: int,
    load: Load,
    on_step: Callable[[], None],
) -> list[Pair]:
    trees = {"before": before, "after": ROOT}
    names = {version: f"{kind}_{version}" for version in trees}
    sessions = {
        version: await _seed(environment, names[version], tree, kind)
        for version, tree in trees.items()
    }
    figures: dict[str, list[Figures]] = {version: [] for version in trees}
    answered = dict.fromkeys(trees, 0.0)
    async with (
        _serve(environment, names["before"], trees["before"]) as old,
        _serve(environment, names["after"], trees["after"]) as new,
    ):
        subjects = {
            version: _subject(kind, server, sessions[version], load)
            for version, server in (("before", old), ("after", new))
        }
        for number in range(pairs):
            for version in sorted(trees, reverse=number % 2 == 0):
                measured = await measure_once(
                    environment, subjects[version], load, environment.folder
                )
                figures[version].append(measured)
                answered[version] += measured.answered
                on_step()
    if kind == "append":
        for version, name in names.items():
            await _check(environment, name, int(answered[version]))
    return [Pair(*pair) for pair in zip(figures["before"], figures["after"], strict=True)]


@asynccontextmanager
async def _serve(environment: Environment, name: str, tree: Path) -> AsyncIterator[Server]:
    async with environment.service(name, name, PYTHONPATH=source_path(tree)) as server:
        yield server


async def _seed(environment: Environment, database: str, tree: Path, kind: str) -> list[Session]:
    await environment.new_database(database, tree)
    sessions = workload.new_sessions(SESSIONS)
    messages = 0 if kind == "append" else workload.SESSION_MESSAGES
    async with environment.connect(database) as connection:
        await workload.seed(connection, sessions, messages)
    return sessions


def _subject(kind: str, server: Server, sessions: Sequence[Session], load: Load) -> Subject:
    if kind == "append":
        count = int(MAX_CALLS_PER_SECOND * (load.seconds + load.warmup))
        return Subject(
            server.name, server, "AppendMessages", workload.append_bodies(sessions, count)
        )
    if kind == "context":
        bodies = workload.context_bodies(sessions)
        return Subject(server.name, server, "GetContext", bodies, cycle=True)
    bodies = workload.list_bodies(sessions)
    return Subject(server.name, server, "ListMessages", bodies, cycle=True)


async def _check(environment: Environment, database: str, acknowledged: int) -> None:
    async with environment.connect(database) as connection:
        stored, is_gapless = await workload.count_rows(connection)
    if stored != acknowledged or not is_gapless:
        raise BenchError(f"{acknowledged} messages were acknowledged and {stored} are stored")


def table(results: dict[str, list[Pair]], load: Load) -> Table:
    """Show every pair, the median of the ratios and its lower bound."""
    title = f"after / before, {load.in_flight} in flight, {load.seconds:g} s each"
    output = Table(
        "",
        "before/s",
        "after/s",
        "median",
        "lower 95%",
        "CPU per call",
        "ratios",
        title=title,
        title_justify="left",
    )
    for kind, pairs in results.items():
        ratios = [pair.ratio for pair in pairs]
        output.add_row(
            kind,
            f"{median(pair.before.calls_per_second for pair in pairs):.0f}",
            f"{median(pair.after.calls_per_second for pair in pairs):.0f}",
            f"{median(ratios):.3f}",
            f"{lower_bound(ratios):.3f}",
            f"{median(pair.cpu_ratio for pair in pairs):.3f}",
            " ".join(f"{ratio:.3f}" for ratio in ratios),
        )
    return output
