"""The lines of a report of `chat-history check`."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Verdict(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """Works, but could be improved."""
    TODO = "todo"
    """Does not work until the operator acts."""


class Finding(NamedTuple):
    """One line of a report."""

    subject: str
    message: str
    verdict: Verdict = Verdict.OK
