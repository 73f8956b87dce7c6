"""Prometheus metrics. They cost nothing while `CHAT_HISTORY_METRICS_LISTEN` is not set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import grpc

LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the buckets of the event loop's lag."""


class CallObserver(Protocol):
    """Callback invoked once for each finished call: its method, status and duration in seconds."""

    def __call__(self, method: str, code: grpc.StatusCode, seconds: float, /) -> None:
        """Record one finished call."""


class CounterSource(NamedTuple):
    """A counter that another component keeps, by the values of one label."""

    help_text: str
    label: str
    read: Callable[[], Mapping[str, int]]


class Metrics:
    """A Prometheus registry and the HTTP endpoint that serves it."""

    def __init__(
        self,
        host: str,
        port: int,
        gauges: dict[str, tuple[str, Callable[[], float]]],
        counters: dict[str, CounterSource],
    ) -> None:
        """Serve the metrics.

        Args:
            host: Address to listen on.
            port: Port to listen on; 0 selects a free port.
            gauges: Help text and reader of each gauge, by name.
            counters: Sources of counters, by name without `_total`.

        Raises:
            OSError: The address cannot be listened on.
        """
        # Imported here so that a service without metrics does not load the package.
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
        from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415
        from prometheus_client.registry import Collector  # noqa: PLC0415

        class _Counters(Collector):
            def collect(self) -> Iterator[Any]:
                for name, source in counters.items():
                    family = CounterMetricFamily(name, source.help_text, labels=[source.label])
                    for value, count in source.read().items():
                        family.add_metric([value], count)
                    yield family

        registry = CollectorRegistry()
        for collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
            registry.register(collector)
        self._handled = Counter(
            "grpc_server_handled",
            "Finished calls by status.",
            ["grpc_method", "grpc_code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Duration of calls.",
            ["grpc_method"],
            registry=registry,
        )
        self._loop_lag_s = Histogram(
            "chat_history_event_loop_lag_seconds",
            "Delay of the event loop, ten times a second.",
            buckets=LAG_BUCKETS_S,
            registry=registry,
        )
        for name, (help_text, read) in gauges.items():
            Gauge(name, help_text, registry=registry).set_function(read)
        registry.register(_Counters())
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def observe(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count one finished call. Implements `CallObserver`."""
        self._handled.labels(method, code.name).inc()
        self._seconds.labels(method).observe(seconds)

    def observe_loop_lag(self, seconds: float) -> None:
        """Record the lag of one heartbeat of the event loop."""
        self._loop_lag_s.observe(seconds)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
