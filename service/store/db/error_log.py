"""Logs the causes of database errors that an operator can correct."""

from __future__ import annotations

import time

import structlog

from service.store.db.db_errors import rule, sqlstate

LOG_INTERVAL_S = 60.0
"""Seconds in which one SQLSTATE is logged once: during an outage every statement fails."""

_log = structlog.get_logger(__name__)


class ErrorLog:
    """Logs one line a minute for each SQLSTATE whose rule names a cause."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def add(self, error: BaseException) -> None:
        """Log the cause of an error, unless it was logged within the last minute."""
        state, cause = sqlstate(error), rule(error).cause
        if state is None or not cause:
            return
        now = time.monotonic()
        logged_at = self._logged_at.get(state)
        if logged_at is not None and now - logged_at < LOG_INTERVAL_S:
            return
        self._logged_at[state] = now
        _log.warning("database error", sqlstate=state, cause=cause)
