"""Logs what libraries and the interpreter report, without the text of their reports.

asyncio, grpc and others log the text of exceptions and the arguments of callbacks, and Python
prints unhandled exceptions and warnings. All of these texts may hold content or secrets. The
events here name the exception and the code locations instead.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO

import structlog

from service.telemetry.exceptions import location, locations

_log = structlog.get_logger(__name__)

_TEMPLATE_LOGGERS = frozenset({"asyncio", "grpc", "sqlalchemy"})
"""Libraries whose messages with arguments are constants. Others also format texts beforehand."""


class LibraryHandler(logging.Handler):
    """Logs the records of the standard library's loggers, which only libraries use."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record by its logger, its code location, and the text that its arguments fill."""
        error = record.exc_info[1] if record.exc_info else None
        is_constant = record.args and record.name.partition(".")[0] in _TEMPLATE_LOGGERS
        _log.warning(
            "message of a library",
            logger=record.name,
            severity=record.levelname.lower(),
            at=location(record.pathname, record.lineno, record.funcName),
            template=str(record.msg) if is_constant else None,
            error=None if error is None else type(error).__name__,
            where=[] if error is None else locations(error),
        )


def report_without_text() -> None:
    """Take over the reports of libraries and of the interpreter, for the whole process."""
    logging.basicConfig(handlers=[LibraryHandler(logging.WARNING)], force=True)
    warnings.showwarning = _show_warning
    sys.excepthook = _log_unhandled
    threading.excepthook = lambda args: _log_exception("thread", args.exc_value)
    sys.unraisablehook = lambda args: _log_exception("finalizer", args.exc_value)


def _log_unhandled(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, Exception):
        _log_exception("main", error)
    else:  # KeyboardInterrupt
        sys.__excepthook__(kind, error, trace)


def _log_exception(source: str, error: BaseException | None) -> None:
    _log.error(
        "unhandled exception",
        source=source,
        error=type(error).__name__,
        where=[] if error is None else locations(error),
    )


def _show_warning(
    message: Warning | str,  # noqa: ARG001
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    at = location(filename, lineno, "")
    _log.warning("warning of a library", category=category.__name__, at=at)


def describe_exception(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace `exc_info` of an event by the exception's name and its code locations.

    A processor of structlog. Its own renderers print the exception's text and, by default, all
    local variables.
    """
    exc_info = event.pop("exc_info", None)
    if not exc_info:
        return event
    if isinstance(exc_info, BaseException):
        error: BaseException | None = exc_info
    else:
        error = exc_info[1] if isinstance(exc_info, tuple) else sys.exc_info()[1]
    if error is not None:
        event.setdefault("error", type(error).__name__)
        event.setdefault("where", locations(error))
    return event
