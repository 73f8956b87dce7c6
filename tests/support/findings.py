"""The findings of `chat-history check` on a database."""

from __future__ import annotations

from service.doctor import Finding, Pool, describe, diagnose
from service.store.db.dsn import Target, parse

POOL = Pool(8, 4, 240, 12)


async def findings_of(target: str | Target) -> list[Finding]:
    """Return the findings on a database that can be used."""
    if isinstance(target, str):
        target = parse(target)
    return diagnose(await describe(target, 5.0), target, POOL)


def select(findings: list[Finding], subject: str) -> Finding:
    """Return the finding on a subject."""
    [finding] = [finding for finding in findings if finding.subject == subject]
    return finding
