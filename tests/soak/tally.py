"""The figures and problems that are collected during a soak."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from grpc import aio
from grpc_status import rpc_status

from tests.support.failures import read_failure
from tests.support.record import Problem

GRPC_OWN = "(gRPC's own)"
"""The reason of a status of gRPC itself: no server listened, or the client's deadline was over."""
ALLOWED_GROWTH_MIB = 10.0
"""Limit for the growth of resident memory between the first rounds and the last."""
ALLOWED_NEW_DESCRIPTORS = 10.0
"""The same for open file descriptors: as many as the pool's connections come and go."""


@dataclass
class Outage:
    """One fault and the recovery from it."""

    kind: str
    began: float
    ended: float
    recovered: float | None = None
    """The time at which every affected replica had acknowledged an append again."""
    errors: int = 0
    """The failed calls from the start of the fault to the recovery."""

    @property
    def recovery(self) -> float | None:
        """Seconds from the end of the fault to the recovery; None if there was none."""
        return None if self.recovered is None else self.recovered - self.ended


@dataclass
class Sample:
    """The memory of one replica at one time."""

    seconds: float
    replica: str
    pid: int
    mib: float
    acknowledged: int
    at_rest: bool = False
    """Whether there was no load and no fault, so that the sample can be compared with others."""
    descriptors: int = 0
    """Its open file descriptors."""


@dataclass
class Tally:
    """All counters, samples and problems of a soak."""

    started: float = field(default_factory=time.monotonic)
    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By code and reason."""
    library_calls: int = 0
    library_errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Errors that the client library raised, by code and reason."""
    acknowledged: int = 0
    abandoned: int = 0
    """Appends that were abandoned without a reply."""
    replays: int = 0
    cancelled: int = 0
    checked: int = 0
    """Stored messages that were checked, each at least once."""
    views: int = 0
    documents: int = 0
    """Documents that were acknowledged, and found to be indexed."""
    outages: list[Outage] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    probes: int = 0
    idle_statements: int | None = None
    """Statements that the idle service sent; None if there was no idle time."""
    allowed_growth_mib: float = ALLOWED_GROWTH_MIB
    last_acknowledged: dict[str, float] = field(default_factory=dict)
    """The time of the last acknowledged append by replica."""
    last_searched: dict[str, float] = field(default_factory=dict)
    """The time of the last answered search by replica."""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def failed(self) -> int:
        """The number of failed calls."""
        return self.errors.total()

    def add_problem(self, kind: str, words: str) -> None:
        """Add a problem, which makes the soak fail."""
        self.problems.append(Problem(kind, words))

    def count_failure(self, rpc: str, error: aio.AioRpcError) -> str:
        """Count a failed call, check its details, and return its reason."""
        code, reason = error.code().name, GRPC_OWN
        if rpc_status.from_call(error) is not None:  # type: ignore[arg-type]
            try:
                reason = read_failure(error).reason
            except AssertionError as problem:
                self.add_problem("ERROR", f"{rpc}: {problem}")
        if (code in ("INTERNAL", "UNKNOWN") and reason != GRPC_OWN) or code == "INVALID_ARGUMENT":
            self.add_problem("ERROR", f"{rpc}: {code} {reason} {error.details()}")
        self.errors[code, reason] += 1
        return reason

    def count_problems(self, *kinds: str) -> int:
        """Return the number of problems of these kinds."""
        return sum(problem.kind in kinds for problem in self.problems)


def growth(
    samples: Sequence[Sample], level_of: Callable[[Sample], float] = attrgetter("mib")
) -> float | None:
    """Return the growth of one process's memory in MiB, or None if there are too few samples.

    Another figure of the samples may be chosen instead of the memory. The growth is the difference
    between the medians of the last and of the first third of the samples at rest. The first of
    these samples is left out, because pools and caches were still being filled.
    """
    levels = [level_of(sample) for sample in samples if sample.at_rest][1:]
    third = max(1, len(levels) // 3)
    if len(levels) < 2:
        return None
    return statistics.median(levels[-third:]) - statistics.median(levels[:third])
