"""Comparisons: subjects are loaded in turn, several times over, and the medians are what counts.

A ratio is made of two figures of the same round, which lie seconds apart: what else the machine does weighs on both.
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
    """A server and what is asked of it."""

    name: str
    server: Server
    path: str
    bodies: Bodies
    cycle: bool = False
    """Whether the bodies may be sent again and again."""
    http1: bool = False
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Figures:
    """What one subject came to, in one round or as the medians of all."""

    calls_per_second: float
    p50_us: float
    p90_us: float
    p99_us: float
    cpu_us_per_call: float
    """Of the server's process."""
    postgres_us_per_call: float
    load_generator_us_per_call: float
    bytes_per_reply: float
    answered: float
    """Calls answered, those outside the window included."""


NAMES = tuple(Figures.__dataclass_fields__)


@dataclass
class Comparison:
    """What a comparison came to: rounds by subject."""

    load: Load
    rounds: dict[str, list[Figures]] = field(default_factory=dict)

    def medians(self, subject: str) -> Figures:
        """Return the medians over the rounds."""
        rounds = self.rounds[subject]
        return Figures(
            **{name: median(getattr(figures, name) for figures in rounds) for name in NAMES}
        )

    def ratios(self, subject: str, other: str) -> dict[str, float]:
        """Return the medians over the rounds of one subject's figures by the other's."""
        pairs = list(zip(self.rounds[subject], self.rounds[other], strict=True))
        return {
            name: median(getattr(ours, name) / getattr(theirs, name) for ours, theirs in pairs)
            for name in NAMES
            if all(getattr(theirs, name) for _, theirs in pairs)
        }

    def answered(self, *subjects: str) -> int:
        """Return how many calls were answered in all."""
        return int(
            sum(figures.answered for subject in subjects for figures in self.rounds[subject])
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for the file of results: medians, rounds, and the first subject's ratios to each other one."""
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
    """Load one subject once.

    Raises:
        BenchError: a call failed.
    """
    server = subject.server
    bodies = subject.bodies(folder)
    load = replace(
        load, http1=subject.http1, cycle=subject.cycle, headers=subject.headers, pid=server.pid
    )
    before = environment.postgres_seconds()
    try:
        answer = await generate_load(
            environment.load_generator, server.address, SERVICE + subject.path, bodies, load
        )
    except BenchError as error:
        raise BenchError(f"{subject.name}: {error}\n{environment.log(server.name)}") from None
    finally:
        bodies.unlink(missing_ok=True)
    if not answer.replies:
        raise BenchError(f"{subject.name}: no reply within {load.seconds:g} s")
    answered = sum(answer.statuses.values())
    return Figures(
        calls_per_second=answer.replies / answer.seconds,
        p50_us=answer.p50,
        p90_us=answer.p90,
        p99_us=answer.p99,
        cpu_us_per_call=answer.cpu[0] / answer.replies * 1e6,
        postgres_us_per_call=(environment.postgres_seconds() - before) / answered * 1e6,
        load_generator_us_per_call=answer.load_generator_cpu_s / answer.replies * 1e6,
        bytes_per_reply=answer.bytes / answer.replies,
        answered=answered,
    )


async def compare(
    environment: Environment,
    subjects: Sequence[Subject],
    load: Load,
    rounds: int,
    on_step: Callable[[], None],
) -> Comparison:
    """Load the subjects in turn, so many rounds.

    Raises:
        BenchError: a call failed.
    """
    result = Comparison(load, {subject.name: [] for subject in subjects})
    for _ in range(rounds):
        for subject in subjects:
            result.rounds[subject.name].append(
                await measure_once(environment, subject, load, environment.folder)
            )
            on_step()
    return result
