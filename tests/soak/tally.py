"""What is counted during a soak, and what is made of it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpc import aio
from grpc_status import rpc_status

from tests.support.failures import read_failure
from tests.support.record import Problem

OWN = "(gRPC's own)"
"""The reason of a status that did not come from the service: nobody listened, or the client's deadline was over."""
ALLOWED_GROWTH_MIB = 10.0
"""How much the resident memory may grow between the first rounds and the last."""


@dataclass
class Outage:
    """One fault and what came of it."""

    kind: str
    began: float
    ended: float
    recovered: float | None = None
    """When each replica that was hit had acknowledged an append again."""
    errors: int = 0
    """Calls that failed from its beginning until then."""

    @property
    def recovery(self) -> float | None:
        """Seconds from its end to the first append that was acknowledged; None when none was."""
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
    """Whether nobody called just then, and nothing was broken: such samples can be compared."""


@dataclass
class Tally:
    """Everything that is counted."""

    started: float = field(default_factory=time.monotonic)
    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By code and reason."""
    library_calls: int = 0
    library_errors: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What users of the client library saw of it all."""
    acknowledged: int = 0
    abandoned: int = 0
    """Appends that were given up without an answer."""
    replays: int = 0
    cancelled: int = 0
    checked: int = 0
    """Stored messages that the judge has looked at, each at least once."""
    views: int = 0
    outages: list[Outage] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    probes: int = 0
    idle_statements: int | None = None
    """How many statements an idle service sent; None when there was no idle time."""
    allowed_growth: float = ALLOWED_GROWTH_MIB
    last_acknowledged: dict[str, float] = field(default_factory=dict)
    """When each replica last acknowledged an append."""

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self.started

    @property
    def failed(self) -> int:
        """How many calls have failed."""
        return self.errors.total()

    def blame(self, kind: str, words: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, words))

    def failure(self, rpc: str, error: aio.AioRpcError) -> str:
        """Count a failed call and return the reason."""
        code, reason = error.code().name, OWN
        if rpc_status.from_call(error) is not None:  # type: ignore[arg-type]
            try:
                reason = read_failure(error).reason
            except AssertionError as problem:
                self.blame("ERROR", f"{rpc}: {problem}")
        if (code in ("INTERNAL", "UNKNOWN") and reason != OWN) or code == "INVALID_ARGUMENT":
            self.blame("ERROR", f"{rpc}: {code} {reason} {error.details()}")
        self.errors[code, reason] += 1
        return reason

    def of(self, *kinds: str) -> int:
        """Return how many problems there are of these kinds."""
        return sum(problem.kind in kinds for problem in self.problems)


def growth(samples: Sequence[Sample]) -> float | None:
    """Return by how many MiB the memory of one process grew: the median of the last third of its samples at rest beyond that of the first.

    The first sample is left out, as pools and caches were being filled. None when there are too few to tell.
    """
    levels = [sample.mib for sample in samples if sample.at_rest][1:]
    third = max(1, len(levels) // 3)
    if len(levels) < 2:
        return None
    return statistics.median(levels[-third:]) - statistics.median(levels[:third])
