"""The composition root: wires the parts, serves, drains."""

from __future__ import annotations

import asyncio
import errno
import faulthandler
import gc
import importlib.util
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc
import structlog
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.auth import credentials
from service.auth.authenticators import trust_all
from service.auth.tls import Certificates
from service.config import BadConfiguration, Settings, split_address
from service.rpc import connections
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.audit import AuditTrail
from service.rpc.health import SERVICE, Health, Readiness
from service.rpc.pipeline import MAX_REQUEST_BYTES, Pipeline
from service.rpc.servicer import DESCRIPTOR, ChatHistoryServicer
from service.rpc.users import external_id_lookup
from service.search.disabled import AnySearch, SearchDisabled
from service.store.append.appender import Appender
from service.store.db.database import Database
from service.store.db.dsn import Target
from service.store.watch import WatchHub
from service.telemetry.metrics import Metrics

LINGER = 0.5
"""Seconds for which a server that is in use still refuses new calls, and the last answers are carried away, before it hangs up."""
IN_USE = 1.0
"""Seconds after its last call for which a server counts as in use: callers take a moment between one call and the next."""
MAX_METADATA_BYTES = 16 * 1024
MAX_PENDING = 8192
SETTLE = 1.0
"""Seconds that gRPC gets to end, once its connections have."""
LAST_WRITES = 2.0
"""Seconds that writes get at the end whose callers are gone; nobody has been told of them."""
LAST_INDEXING = 5.0
"""Seconds that search gets at the end."""
ENDING = 15.0
"""Seconds after the grace by which the process has ended, whatever hangs."""

_OPTIONS = [
    # What is too large by less than as much again is read, to be refused with a reason; beyond, gRPC refuses it without one.
    ("grpc.max_receive_message_length", 2 * MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # One process a port: a second one must fail instead of silently taking half of the connections.
    ("grpc.so_reuseport", 0),
    # Calls that wait to be taken up. Beyond 1,000 gRPC would end some as CANCELLED, which tells nobody to come again; admission refuses
    # them with a reason. This bounds memory alone.
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
    # Else streams also count whose memory is not yet free, and under load calls within the limit are refused (REFUSED_STREAM).
    ("grpc.http.overload_protection", 0),
    # Below the clients' interval, or their pings end in GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # What decides in current versions: how long a ping may stay unanswered before the connection counts as dead (60 s by default).
    ("grpc.http2.ping_timeout_ms", 20_000),
]

_log = structlog.get_logger(__name__)


class Server:
    """The whole service in one process. `start`, then `stop`, once each."""

    def __init__(self, settings: Settings, target: Target) -> None:
        """Wire the parts.

        Raises:
            BadConfiguration: a key or a certificate cannot be used.
        """
        self.settings = settings
        self.certificates = credentials.load_certificates(settings)
        self.database = Database(
            target,
            pool_size=settings.db_pool_size,
            max_overflow=settings.db_max_overflow,
            pool_timeout=settings.db_pool_timeout,
            recycle=settings.db_pool_recycle,
            connect_timeout=settings.db_connect_timeout,
            hot_pool_size=settings.append_lanes + settings.read_connections,
        )
        self.authenticate = credentials.make_authenticator(
            settings, external_id_lookup(self.database)
        )
        self.readiness = Readiness(self.database)
        self.database.on_suspected_outage = self.readiness.request_probe
        self.search = search = self._make_search()
        self.health = Health(
            self.database,
            self.readiness,
            (lambda: search.is_healthy) if search.is_enabled else None,
        )
        self.appender = Appender(
            self.database, settings.append_lanes, search_enabled=search.indexes_messages
        )
        self.watchers = WatchHub(self.database)
        self.appender.on_appended = (
            self._appended if search.indexes_messages else self.watchers.session_changed
        )
        self.calls = Admission(settings.max_in_flight)
        self.streams = StreamAdmission(
            settings.max_watches, max(1, settings.max_calls_per_connection // 2)
        )
        self.metrics = self._start_metrics()
        self.address = settings.listen
        """Where it listens, with the port that it took."""
        self._servers: list[tuple[aio.Server, int]] = []

    async def start(self) -> None:
        """Listen; calls are served as soon as the database answers and its schema fits.

        Raises:
            OSError: an address cannot be listened on.
        """
        settings = self.settings
        observe = self.metrics.observe if self.metrics else None
        servicer = ChatHistoryServicer(
            self.database,
            self.appender,
            self.watchers,
            self.search,
            call_timeout=settings.call_timeout,
        )
        pipeline = Pipeline(
            self.authenticate,
            self.calls,
            self.streams,
            settings.call_timeout,
            observe,
            AuditTrail(callers_are_identified=self.authenticate is not trust_all),
        )
        options = [*_OPTIONS, ("grpc.max_concurrent_streams", settings.max_calls_per_connection)]
        server = aio.server(options=options)
        handlers = grpc.method_handlers_generic_handler(
            SERVICE, pipeline.handlers(DESCRIPTOR, servicer)
        )
        server.add_generic_rpc_handlers((handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = (
            SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)
        self.address, port = _listen(server, settings.listen, self.certificates)
        self._servers.append((server, port))
        if settings.health_listen is not None:
            probes = aio.server(options=options)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, probes)
            _, port = _listen(probes, settings.health_listen)
            self._servers.append((probes, port))
        for each, _ in self._servers:
            await each.start()
        # What lives as long as the process need not be looked at by every collection.
        gc.collect()
        gc.freeze()
        self.readiness.request_probe()
        self.search.start()

    async def stop(self) -> None:
        """Turn NOT_SERVING, finish what is under way within the grace, and close; no acknowledged write is lost.

        Each step has a bound of its own: clients, database and search may all be silent.
        """
        loop = asyncio.get_running_loop()
        self.readiness.drain()
        await asyncio.sleep(self.settings.shutdown_delay)
        self.calls.is_draining = self.streams.is_draining = True
        # An open stream would eat the whole grace.
        self.watchers.close()
        give_up = loop.time() + self.settings.shutdown_grace
        await self._drain_calls(give_up)
        self.health.close()
        await asyncio.gather(
            *(self._close_connections(server, port) for server, port in self._servers)
        )
        credentials.close_authenticator(self.authenticate)
        steps = [
            _at_most(LAST_WRITES, "questions to the database", self.health.finish()),
            self.appender.drain(LAST_WRITES),
            _at_most(LAST_INDEXING, "search", self.search.stop()),
        ]
        await asyncio.gather(*steps)
        await self.database.close(LAST_WRITES)
        if self.metrics:
            self.metrics.close()
        gc.unfreeze()

    def _make_search(self) -> AnySearch:
        if self.settings.search == "off":
            return SearchDisabled()
        needed = {
            "wordllama": self.settings.embeddings_url is None,
            "qdrant_client": True,
            "openai": True,
        }
        missing = [
            name
            for name, needs in needed.items()
            if needs and importlib.util.find_spec(name) is None
        ]
        if missing:
            raise BadConfiguration(
                [
                    f"search is on and {missing[0]} is not installed: pip install 'chathistory-service[search]', or set CHAT_HISTORY_SEARCH=off"
                ]
            )
        # Imported here: a service without search does not pay for it.
        from service.search.service import Search  # noqa: PLC0415

        search = Search(self.settings, self.database, self.readiness.wait_ready)
        search.on_change = self.readiness.tell
        return search

    def _appended(self, user_id: str, session_id: str) -> None:
        self.watchers.session_changed(user_id, session_id)
        self.search.wake()

    async def _drain_calls(self, give_up: float) -> None:
        """Let calls under way end, and their answers arrive, while those that come are told to go elsewhere."""
        loop = asyncio.get_running_loop()
        quiet = time.monotonic() - self.calls.last_finished_at > IN_USE
        if quiet and not self.calls.in_flight and not self.streams.in_flight:
            return
        while self._at_work() and loop.time() < give_up:  # noqa: ASYNC110 - once, at the end: no call pays for an event
            await asyncio.sleep(LINGER / 20)
        await asyncio.sleep(LINGER)

    def _at_work(self) -> bool:
        # Followers have been sent away: one that is left does not read.
        return self.calls.in_flight > 0 or self.streams.in_flight > len(self.watchers)

    async def _close_connections(self, server: aio.Server, port: int) -> None:
        """End a server's connections, and with them the calls that have not ended by now; then the server.

        gRPC by itself would wait for every call that it knows of: one that came in the instant in which it was told to stop, which it
        never hands over and never ends, or one whose request never arrives.
        """
        loop = asyncio.get_running_loop()
        # One after the other, and nothing else between: those who are sent away would come back. Whoever manages to is sent away, too.
        loop.call_soon(connections.close_connections, port)
        stopping = loop.create_task(server.stop(None))
        loop.call_soon(connections.close_connections, port)
        await _at_most(SETTLE, "connections", stopping)

    def _start_metrics(self) -> Metrics | None:
        if self.settings.metrics_listen is None:
            return None
        host, port = split_address(self.settings.metrics_listen)
        pool = self.database.engine.pool
        return Metrics(
            host,
            port,
            {
                "chat_history_calls_in_flight": ("Calls under way.", lambda: self.calls.in_flight),
                "chat_history_watches_open": (
                    "Open WatchMessages streams.",
                    lambda: len(self.watchers),
                ),
                "chat_history_appends_waiting": (
                    "Appends that have not left yet.",
                    lambda: self.appender.queued_count,
                ),
                "chat_history_connections_in_use": (
                    "Database connections checked out.",
                    pool.checkedout,  # type: ignore[attr-defined]
                ),
                "chat_history_search_ready": (
                    "Whether the search index answers.",
                    lambda: self.search.is_healthy,
                ),
                "chat_history_search_waiting": (
                    "Documents and sessions that wait to be indexed, when last looked.",
                    lambda: self.search.stats.pending,
                ),
                "chat_history_search_failed": (
                    "Documents and sessions that were given up, when last looked.",
                    lambda: self.search.stats.failed,
                ),
                "chat_history_search_lag_seconds": (
                    "Age of the oldest change that was not indexed, when last looked.",
                    lambda: self.search.stats.lag_s,
                ),
                "chat_history_search_points": (
                    "Points written to the search index since the start.",
                    lambda: self.search.stats.indexed,
                ),
                "chat_history_ready": (
                    "Whether the service is ready.",
                    lambda: self.readiness.ready,
                ),
            },
        )


def _listen(
    server: aio.Server, address: str, certificates: Certificates | None = None
) -> tuple[str, int]:
    """Listen on an address, in plaintext without certificates; return it with the port taken, and that port.

    Raises:
        OSError: it cannot be listened on.
    """
    host, _ = split_address(address)
    try:
        taken = (
            server.add_secure_port(address, certificates.credentials())
            if certificates is not None
            else server.add_insecure_port(address)
        )
    except RuntimeError:
        taken = 0
    if not taken:
        raise OSError(errno.EADDRINUSE, "cannot listen on this address", address)
    return f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}", taken


async def _at_most(seconds: float, what: str, step: Awaitable[object]) -> None:
    """Wait for a step of the end, but not longer than this; what it leaves ends with the process."""
    task = asyncio.ensure_future(step)
    _, late = await asyncio.wait((task,), timeout=seconds)
    if late:
        _log.warning("the end does not wait any longer", step=what)
        task.cancel()
    else:
        task.result()


async def run(
    settings: Settings,
    target: Target,
    *,
    on_ready: Callable[[str], None] = lambda _address: None,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGINT or SIGTERM, drain, and return. `on_ready` is called once, with the address, when calls are served.

    `told_to_stop` says whether a signal has come before this listens to signals; nothing is begun then.

    From the signal on the process has the grace and ENDING seconds to end; then it is ended, and every thread's place is written down.

    Raises:
        OSError: an address cannot be listened on.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if told_to_stop():
        return
    for note in target.notes:
        _log.info(note)
    server = Server(settings, target)
    try:
        await server.start()
        stopped = loop.create_task(stopping.wait())
        ready = loop.create_task(server.readiness.wait_ready())
        await asyncio.wait((stopped, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            on_ready(server.address)
        await stopped
        ready.cancel()
        with suppress(asyncio.CancelledError):
            await ready
    finally:
        # It needs no loop and no lock, whatever holds those.
        with suppress(
            RuntimeError, ValueError, OSError
        ):  # Without a standard error it has nowhere to write.
            faulthandler.dump_traceback_later(
                settings.shutdown_delay + settings.shutdown_grace + ENDING, exit=True
            )
        await server.stop()
