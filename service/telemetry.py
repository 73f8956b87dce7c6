"""Logs and metrics. A leaf: imports nothing of ours.

Logs carry ids, never message text and never a connection string. Metrics cost nothing while `CHAT_HISTORY_METRICS_LISTEN` is not set.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Literal, Protocol

import grpc
import structlog


class Observer(Protocol):
    """What the pipeline tells of each call: its method, its status and how long it took, in seconds."""

    def __call__(self, method: str, code: grpc.StatusCode, seconds: float, /) -> None:
        """Take one finished call in."""


def configure_logging(level: str, style: Literal["auto", "console", "json"]) -> None:
    """Write log lines to standard error: for people on a terminal, else as JSON, one a line."""
    console = sys.stderr.isatty() if style == "auto" else style == "console"
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.dict_tracebacks]),
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


# Written whatever the level of the log.
_audit = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET)
)


def audit(**fields: str | int) -> None:
    """Write a line of the audit trail: who did what to whose things, and how it ended; ids only."""
    _audit.info("audit", **fields)


class Metrics:
    """Prometheus figures, served as text."""

    def __init__(
        self, host: str, port: int, gauges: dict[str, tuple[str, Callable[[], float]]]
    ) -> None:
        """Serve on an address.

        Args:
            gauges: By name: what it is, and how to read it.

        Raises:
            OSError: the address cannot be listened on.
        """
        # Imported here: a service without metrics does not pay for it.
        from prometheus_client import (  # noqa: PLC0415
            GC_COLLECTOR,
            PLATFORM_COLLECTOR,
            PROCESS_COLLECTOR,
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            start_http_server,
        )

        registry = CollectorRegistry()
        for collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
            registry.register(collector)
        self._handled = Counter(
            "grpc_server_handled",
            "Calls finished, by status.",
            ["grpc_method", "grpc_code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time taken by calls.",
            ["grpc_method"],
            registry=registry,
        )
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(read)
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def observe(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count one finished call."""
        self._handled.labels(method, code.name).inc()
        self._seconds.labels(method).observe(seconds)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
