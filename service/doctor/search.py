"""Checks the changes that the search index does not have yet."""

from __future__ import annotations

from service.doctor.description import IndexState
from service.doctor.findings import Finding, Verdict

INDEX_LAG_NOTE_S = 60.0
"""Age in seconds of the oldest pending index change from which the report mentions it."""


def check_search(state: IndexState | None) -> list[Finding]:
    if state is None:
        return []
    pending, failed, age_s = state.backlog.pending, state.backlog.failed, state.backlog.oldest_age_s
    message = (
        f"{pending} documents and sessions wait to be indexed, the oldest for {age_s:.0f} s"
        if pending
        else "the index is up to date"
    )
    findings = [
        Finding("search", message, Verdict.NOTE if age_s > INDEX_LAG_NOTE_S else Verdict.OK)
    ]
    if state.backlog.dated_ahead:
        ahead = (
            f"{state.backlog.dated_ahead} of them are dated ahead, as after PostgreSQL's clock was "
            "set back: a running service indexes them, so start it if it is stopped"
        )
        findings.append(Finding("search", ahead, Verdict.NOTE))
    if failed:
        failures = (
            f"{failed} could not be indexed, for example {state.dead_letter_example}: "
            "`chat-history reindex` retries them"
        )
        findings.append(Finding("search", failures, Verdict.NOTE))
    return findings
