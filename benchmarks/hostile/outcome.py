"""The measurements of one attack, the bounds that they must keep, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.hostile.attacks import Attack
from benchmarks.table import Table

P99_FACTOR = 3.0
P99_MIN_MS = 100.0
"""The other user's p99 may reach this, or `P99_FACTOR` times the quiet one if that is more."""
LIVENESS_MS = 200.0
SLOWEST_CALL_MS = 1_000.0
"""Limit of a single call of the other user: one stall hides from a p99 of 300 calls."""
_DEFECT_STATUSES = ("INTERNAL", "UNKNOWN")
"""Answers that no request may cause."""
_DEFECT_EVENTS = ("internal error", "not ready")
"""Events in the log that no request may cause."""
_SHOWN_STATUSES = 4


def quantile_ms(durations_s: Sequence[float], share: float) -> float:
    """Return a quantile in milliseconds, 0 without measurements."""
    if not durations_s:
        return 0.0
    ordered = sorted(durations_s)
    return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@dataclass(frozen=True)
class Quiet:
    """The other user's measurements without an attack."""

    append_p99_ms: float
    read_p99_ms: float
    resident_mib: float


@dataclass
class Outcome:
    """The effect of one attack."""

    attack: Attack
    durations_s: dict[str, list[float]]
    failures: list[str]
    """The other user's calls that failed."""
    peak_mib: float
    resident_mib: float
    """Memory of the service when it was calm again."""
    is_calm: bool
    """Whether the service became calm in time."""
    tally: dict[str, int] = field(default_factory=dict)
    postgres_mib: float = 0.0
    search_mib: float = 0.0
    events: dict[str, int] = field(default_factory=dict)
    """Events that the service logged, with their counts."""
    is_running: bool = True

    def figures(self) -> dict[str, float]:
        """Return the figures of the report."""
        return {
            "append_p99_ms": quantile_ms(self.durations_s["append"], 0.99),
            "read_p99_ms": quantile_ms(self.durations_s["read"], 0.99),
            "slowest_ms": 1000
            * max(max(self.durations_s[name], default=0.0) for name in ("append", "read")),
            "other_max_ms": quantile_ms(self.durations_s["other"], 1.0),
            "liveness_max_ms": quantile_ms(self.durations_s["liveness"], 1.0),
            "peak_mib": self.peak_mib,
            "resident_mib": self.resident_mib,
            "postgres_mib": self.postgres_mib,
            "search_mib": self.search_mib,
        }

    def breaks(self, quiet: Quiet, budget_mib: float) -> list[str]:
        """Return the bounds that the attack broke, each as a phrase."""
        figures = self.figures()
        problems = []
        for name, quiet_ms in (("append", quiet.append_p99_ms), ("read", quiet.read_p99_ms)):
            limit_ms = max(P99_FACTOR * quiet_ms, P99_MIN_MS)
            if (p99_ms := figures[f"{name}_p99_ms"]) > limit_ms:
                problems.append(f"{name} p99 {p99_ms:.0f} ms")
            if not self.durations_s[name]:
                problems.append(f"no {name} ended")
        for name, limit, text in (
            ("slowest_ms", SLOWEST_CALL_MS, "slowest call {:.0f} ms"),
            ("liveness_max_ms", LIVENESS_MS, "liveness {:.0f} ms"),
            ("peak_mib", budget_mib, "memory {:.0f} MiB"),
        ):
            if figures[name] > limit:
                problems.append(text.format(figures[name]))
        problems += [
            f"other user: {failure} x{count}"
            for failure, count in Counter(self.failures).most_common(3)
        ]
        problems += [
            f"answers {status} x{count}"
            for status, count in self.tally.items()
            if status.startswith(_DEFECT_STATUSES)
        ]
        problems += [
            f"logged {event} x{self.events[event]}"
            for event in _DEFECT_EVENTS
            if event in self.events
        ]
        if not self.is_calm:
            problems.append("not calm afterwards")
        if not self.is_running:
            problems.append("the service ended")
        return problems

    def tally_text(self) -> str:
        """Return the most frequent statuses of the attacker's calls."""
        shown = Counter(self.tally).most_common(_SHOWN_STATUSES)
        return ", ".join(f"{status} {count:,}" for status, count in shown) or "no result"

    def to_dict(self, quiet: Quiet, budget_mib: float) -> dict[str, Any]:
        """Return everything for the file of results, but the single durations."""
        return {
            "attack": str(self.attack),
            "kind": self.attack.kind,
            "parameters": self.attack.parameters,
            "seed": self.attack.seed,
            "search": self.attack.needs_search,
            **{name: round(value, 1) for name, value in self.figures().items()},
            "failures": dict(Counter(self.failures)),
            "tally": self.tally,
            "events": self.events,
            "breaks": self.breaks(quiet, budget_mib),
        }


def summary(outcomes: Sequence[Outcome], quiet: Quiet, budget_mib: float) -> Table:
    """Return the table of the kinds of attack, with the worst figure of each."""
    kinds = sorted({outcome.attack.kind for outcome in outcomes})
    rows = []
    for kind in (*kinds, "all"):
        group = [outcome for outcome in outcomes if kind in ("all", outcome.attack.kind)]
        figures = [outcome.figures() for outcome in group]

        def worst(name: str, figures: list[dict[str, float]] = figures) -> str:
            return f"{max(figure[name] for figure in figures):,.0f}"

        broken = sum(bool(outcome.breaks(quiet, budget_mib)) for outcome in group)
        rows.append(
            [
                kind,
                f"{len(group)}",
                worst("append_p99_ms"),
                worst("read_p99_ms"),
                worst("slowest_ms"),
                worst("liveness_max_ms"),
                worst("peak_mib"),
                f"{sum(len(outcome.failures) for outcome in group)}",
                f"{broken}",
            ]
        )
    columns = (
        "kind of attack",
        "attacks",
        "append p99 ms",
        "read p99 ms",
        "slowest ms",
        "liveness ms",
        "memory MiB",
        "refused",
        "broken",
    )
    note = (
        "The worst attack of each kind. Refused: calls of the other user that failed. Without an "
        f"attack: append p99 {quiet.append_p99_ms:.1f} ms, read p99 {quiet.read_p99_ms:.1f} ms, "
        f"{quiet.resident_mib:.0f} MiB."
    )
    return Table("Attacks, and what another user notices", columns, rows, note)
