"""The metrics that read the state of a server (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from service.config import split_address
from service.rpc.readiness import Half
from service.store.replica import OUTCOMES
from service.telemetry.metrics import CounterSource, Metrics

if TYPE_CHECKING:
    from service.server import Server


def start_metrics(server: Server) -> Metrics | None:
    """Serve the metrics of a server, if its settings name an address for them.

    Raises:
        OSError: the address cannot be listened on.
    """
    address = server.settings.metrics_listen
    if address is None:
        return None
    host, port = split_address(address)
    try:
        return Metrics(host, port, gauges(server), counters(server))
    except OSError as error:
        error.filename = address
        raise


def gauges(server: Server) -> dict[str, tuple[str, Callable[[], float]]]:
    """Return the help text and the reader of each gauge, by name."""
    return {
        **_load_gauges(server),
        **_search_gauges(server),
        **_readiness_gauges(server),
        "chat_history_replica_lag_seconds": (
            "Time for which the replica lags, at least, at the last read of it.",
            lambda: server.lagging.gate.lag_s if server.lagging else 0,
        ),
    }


def _readiness_gauges(server: Server) -> dict[str, tuple[str, Callable[[], float]]]:
    readiness, prober = server.readiness, server.database.prober
    return {
        "chat_history_ready": (
            "1 if the service is ready, else 0.",
            lambda: readiness.is_ready,
        ),
        "chat_history_reads_ready": (
            "1 if the database can be read, else 0.",
            lambda: readiness.is_up(Half.READS),
        ),
        "chat_history_writes_ready": (
            "1 if the database can be written, else 0.",
            lambda: readiness.is_up(Half.WRITES),
        ),
        "chat_history_tables_locked": (
            "1 while calls wait for a lock on a whole table, else 0.",
            lambda: prober.table_lock is not None,
        ),
    }


def _load_gauges(server: Server) -> dict[str, tuple[str, Callable[[], float]]]:
    pool = server.database.engine.pool
    return {
        "chat_history_calls_in_flight": ("Calls in flight.", lambda: server.calls.in_flight),
        "chat_history_calls_waiting": (
            "Calls that wait to be taken up, or for their requests to be received.",
            lambda: server.untaken_calls.waiting_count + server.receiver.waiting_count,
        ),
        "chat_history_bytes_in_flight": (
            "Bytes of requests and replies that calls hold.",
            lambda: server.budget.held,
        ),
        "chat_history_watches_open": (
            "Open WatchMessages streams.",
            lambda: len(server.watchers),
        ),
        "chat_history_appends_waiting": (
            "Appends that wait for their statement.",
            lambda: server.appender.queued_count,
        ),
        "chat_history_connections_in_use": (
            "Database connections checked out.",
            pool.checkedout,  # type: ignore[attr-defined]
        ),
        "chat_history_database_calls_waiting": (
            "Calls that wait for a database connection.",
            lambda: server.database.waiting_count,
        ),
        "chat_history_expensive_work": (
            "Searches, large reads, forks and deletes in progress in the database.",
            lambda: server.database.expensive_work.in_progress_count,
        ),
        "chat_history_expensive_work_waiting": (
            "Searches, large reads, forks and deletes that wait for their turn.",
            lambda: server.database.expensive_work.permits.waiting_count,
        ),
    }


def _search_gauges(server: Server) -> dict[str, tuple[str, Callable[[], float]]]:
    return {
        "chat_history_search_ready": (
            "1 if the search index responds, else 0.",
            lambda: server.search.is_healthy,
        ),
        "chat_history_search_waiting": (
            "Documents and sessions that wait to be indexed, at the last check.",
            lambda: server.search.stats.pending,
        ),
        "chat_history_search_failed": (
            "Documents and sessions that could not be indexed, at the last check.",
            lambda: server.search.stats.failed,
        ),
        "chat_history_search_lag_seconds": (
            "Age of the oldest change that is not indexed, at the last check.",
            lambda: server.search.stats.lag_s,
        ),
        "chat_history_search_points": (
            "Points written to the search index since the start.",
            lambda: server.search.stats.indexed,
        ),
        "chat_history_search_full": (
            "1 if the embedded search index has no room for new points, else 0.",
            lambda: server.search.stats.is_full,
        ),
        "chat_history_search_queries_waiting": (
            "Searches that wait for the index or the embeddings.",
            lambda: server.search.query_stats.waiting,
        ),
        "chat_history_search_queries_rejected": (
            "Searches rejected since the start because too many waited.",
            lambda: server.search.query_stats.rejected,
        ),
        "chat_history_search_process_restarts": (
            "Restarts of the search process since the start.",
            lambda: server.search.query_stats.process_restarts,
        ),
    }


def counters(server: Server) -> dict[str, CounterSource]:
    """Return the counters, by name without its suffix."""
    return {
        "chat_history_rejections": CounterSource(
            "Calls rejected or ended because of a limit.", "limit", lambda: rejections(server)
        ),
        "chat_history_replica_reads": CounterSource(
            "Reads that may lag.", "outcome", lambda: replica_reads(server)
        ),
    }


def replica_reads(server: Server) -> dict[str, int]:
    """Return the reads that may lag by their outcomes; zeros if there is no replica."""
    return dict(server.lagging.counts) if server.lagging else dict.fromkeys(OUTCOMES, 0)


def rejections(server: Server) -> dict[str, int]:
    """Return the calls that each limit has rejected or ended since the start."""
    of_bytes = server.budget.rejections
    return {
        "calls": server.calls.rejected_count,
        "streams": server.streams.rejected_count,
        "receiving": server.receiver.rejected_count,
        "deadline": server.untaken_calls.dropped_count,
        "bytes": of_bytes["total"],
        "bytes_of_user": of_bytes["user"],
        "bytes_of_connection": of_bytes["connection"],
        "database": server.database.retries.rejected_count,
        "expensive_work": server.database.expensive_work.rejected_count,
    }
