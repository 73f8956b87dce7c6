"""Comparisons: subjects are measured in turn for several rounds, and the medians are reported.

A ratio is the median of the rounds' ratios. The two figures of a round are measured seconds apart,
so other work on the machine affects both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environment import Environment, Server
from benchmarks.load_generator import BenchError, Load, generate_load
from benchmarks.workload import Bodies

SERVICE = "/chathistory.v1.ChatHistoryService/"


@dataclass(frozen=True)
class Subject:
    """A server and the requests that it gets."""

    name: str
    server: Server
    method: str
    """RPC of the service; not used with `http1`."""
    bodies: Bodies
    cycle: bool = False
    """Send the bodies repeatedly, rather than each body once."""
    http1: bool = False
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Figures:
    """The figures of one subject, of one round or as medians of all rounds."""

    calls_per_second: float
    p50_us: float
    p90_us: float
    p99_us: float
    cpu_us_per_call: float
    """CPU time of the server's process."""
    postgres_us_per_call: float
    load_generator_us_per_call: float
    bytes_per_reply: float
    answered: float
    """Calls answered, including those outside the measuring window."""


FIGURE_NAMES = tuple(Figures.__dataclass_fields__)


@dataclass
class Comparison:
    """The figures of every round, by subject."""

    load: Load
    rounds: dict[str, list[Figures]] = field(default_factory=dict)

    def medians(self, subject: str) -> Figures:
        """Return the medians over the rounds."""
        rounds = self.rounds[subject]
        return Figures(
            **{name: median(getattr(figures, name) for figures in rounds) for name in FIGURE_NAMES}
        )

    def ratios(self, subject: str, other: str) -> dict[str, float]:
        """Return the medians over the rounds of one subject's figures divided by the other's."""
        pairs = list(zip(self.rounds[subject], self.rounds[other], strict=True))
        return {
            name: median(getattr(ours, name) / getattr(theirs, name) for ours, theirs in pairs)
            for name in FIGURE_NAMES
            if all(getattr(theirs, name) for _, theirs in pairs)
        }

    def answered(self, *subjects: str) -> int:
        """Return the number of calls that these subjects answered."""
        return int(
            sum(figures.answered for subject in subjects for figures in self.rounds[subject])
        )

    def as_dict(self) -> dict[str, Any]:
        """Return medians, rounds, and ratios of the first subject to the others."""
        first, *others = self.rounds
        return {
            "in_flight": self.load.in_flight,
            "connections": min(self.load.connections, self.load.in_flight),
            "medians": {name: _rounded(self.medians(name).__dict__) for name in self.rounds},
            "ratios": {other: _rounded(self.ratios(first, other), 3) for other in others},
            "rounds": {
                name: [round(figures.calls_per_second, 1) for figures in rounds]
                for name, rounds in self.rounds.items()
            },
        }


def _rounded(figures: dict[str, float], digits: int = 1) -> dict[str, float]:
    return {name: round(value, digits) for name, value in figures.items() if name != "answered"}


async def measure_once(
    environment: Environment, subject: Subject, load: Load, folder: Path
) -> Figures:
    """Measure one subject once.

    Raises:
        BenchError: a call failed.
    """
    server = subject.server
    bodies = subject.bodies(folder)
    load = replace(
        load, http1=subject.http1, cycle=subject.cycle, headers=subject.headers, pid=server.pid
    )
    postgres_cpu_before_s = environment.postgres_cpu_s()
    try:
        result = await generate_load(
            environment.load_generator, server.address, SERVICE + subject.method, bodies, load
        )
    except BenchError as error:
        raise BenchError(f"{subject.name}: {error}\n{environment.log(server.name)}") from None
    finally:
        bodies.unlink(missing_ok=True)
    if not result.replies:
        raise BenchError(f"{subject.name}: no reply within {load.seconds:g} s")
    answered = sum(result.statuses.values())
    return Figures(
        calls_per_second=result.replies / result.seconds,
        p50_us=result.p50,
        p90_us=result.p90,
        p99_us=result.p99,
        cpu_us_per_call=result.cpu[0] / result.replies * 1e6,
        postgres_us_per_call=(environment.postgres_cpu_s() - postgres_cpu_before_s)
        / answered
        * 1e6,
        load_generator_us_per_call=result.load_generator_cpu_s / result.replies * 1e6,
        bytes_per_reply=result.bytes / result.replies,
        answered=answered,
    )


async def compare(
    environment: Environment,
    subjects: Sequence[Subject],
    load: Load,
    rounds: int,
    on_step: Callable[[], None],
) -> Comparison:
    """Measure the subjects in turn, for a number of rounds.

    Raises:
        BenchError: a call failed.
    """
    comparison = Comparison(load, {subject.name: [] for subject in subjects})
    for _ in range(rounds):
        for subject in subjects:
            comparison.rounds[subject.name].append(
                await measure_once(environment, subject, load, environment.folder)
            )
            on_step()
    return comparison
