"""Checks the server: its version, encoding, durability and timeouts."""

from __future__ import annotations

from service.doctor.description import Description
from service.doctor.findings import Finding, Verdict
from service.store.db.dsn import Target
from service.store.db.durability import find_weaknesses
from service.store.schema.location import encoding_problem

OLDEST_MAJOR, NEWEST_MAJOR = 15, 18
"""Major versions of PostgreSQL that the tests cover."""


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


def check_timeouts(description: Description) -> list[Finding]:
    return [
        Finding(
            name,
            f"{timeout_ms} ms: the server ends statements that take longer, and their callers "
            f"receive UNAVAILABLE; run ALTER ROLE … SET {name} = 0",
            Verdict.TODO,
        )
        for name, timeout_ms in description.short_timeouts_ms
    ]
