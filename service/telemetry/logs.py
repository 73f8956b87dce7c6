"""Structured logs and the audit trail.

Log lines carry ids, never message text, never the text of an unexpected exception, and never a
connection string.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from service.telemetry.reports import describe_exception, report_without_text


def configure_logging(level: str, log_format: Literal["auto", "console", "json"]) -> None:
    """Write log lines to standard error, with those of libraries and of the interpreter.

    Args:
        level: Lowest severity that is written.
        log_format: `console` for terminals, `json` for one JSON object a line, `auto` to choose by
            whether standard error is a terminal.
    """
    is_console = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            describe_exception,
            structlog.dev.ConsoleRenderer() if is_console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    report_without_text()


# The audit trail is written at every log level.
_audit = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET)
)


def audit(**fields: str | int) -> None:
    """Write one line of the audit trail: actor, action, owner and outcome. Ids only."""
    _audit.info("audit", **fields)
