"""Checks the server: its version, encoding, durability, writes and clock."""

from __future__ import annotations

from service.doctor.description import Description
from service.doctor.findings import Finding, Verdict
from service.store.db.dsn import Target
from service.store.db.durability import find_weaknesses
from service.store.schema.location import encoding_problem

OLDEST_MAJOR, NEWEST_MAJOR = 15, 18
"""Major versions of PostgreSQL that the tests cover."""
CLOCK_TOLERANCE_S = 5.0
"""Seconds by which the clocks of PostgreSQL and of this machine may differ."""


def check_version(description: Description) -> Finding:
    if description.major < OLDEST_MAJOR:
        return Finding(
            "PostgreSQL",
            f"{description.version} is not supported: upgrade to {OLDEST_MAJOR} to {NEWEST_MAJOR}",
            Verdict.TODO,
        )
    if description.major > NEWEST_MAJOR:
        return Finding(
            "PostgreSQL",
            f"{description.version} is newer than {NEWEST_MAJOR}, the newest tested version",
            Verdict.NOTE,
        )
    return Finding("PostgreSQL", description.version)


def check_settings(
    description: Description, target: Target, *, raises_synchronous_commit: bool
) -> list[Finding]:
    findings = [
        Finding(
            weakness.setting,
            f"{weakness.value}: {weakness.advice}",
            Verdict.TODO if weakness.is_severe else Verdict.NOTE,
        )
        for weakness in find_weaknesses(
            description.durability,
            raises_synchronous_commit=raises_synchronous_commit,
            is_neon=target.is_neon,
        )
    ]
    problem = encoding_problem(description.encoding, target.url.database or "")
    if problem is not None:
        findings.append(Finding("encoding", problem, Verdict.TODO))
    return findings


def check_writes(description: Description) -> list[Finding]:
    """Return the finding on whether a transaction can be committed, if that was tried."""
    if description.write_problem is None:
        return []
    if description.write_problem:
        return [Finding("writes", description.write_problem, Verdict.TODO)]
    return [Finding("writes", "a transaction was committed, and a temporary file was written")]


def check_clock(description: Description) -> list[Finding]:
    """Return the finding on a clock that differs from that of this machine."""
    ahead_s = description.clock_ahead_s
    if abs(ahead_s) <= CLOCK_TOLERANCE_S:
        return []
    direction = "ahead of" if ahead_s > 0 else "behind"
    message = (
        f"PostgreSQL's clock is {abs(ahead_s):.0f} s {direction} that of this machine: synchronize "
        "both; the times of messages come from PostgreSQL, and those of tokens from this machine"
    )
    return [Finding("clock", message, Verdict.NOTE)]
