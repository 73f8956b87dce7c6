"""The composition root: creates the components, serves, and drains at shutdown."""

from __future__ import annotations

import asyncio
import errno
import gc
import time
from collections.abc import Awaitable, Collection

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
from service.rpc.accepting import UntakenCalls, create_server
from service.rpc.admission import Admission, StreamAdmission
from service.rpc.audit import AuditTrail
from service.rpc.byte_budget import ByteBudget
from service.rpc.connection_limit import ConnectionLimit
from service.rpc.health import SERVICE, Health
from service.rpc.pipeline import Pipeline, find_method
from service.rpc.readiness import Readiness
from service.rpc.receiving import RequestReceiver
from service.rpc.server_options import (
    HANDSHAKE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    connection_count,
    server_options,
)
from service.rpc.servicer import DESCRIPTOR, ChatHistoryServicer
from service.rpc.unread_replies import UnreadReplies
from service.rpc.users import external_id_lookup
from service.search import packages
from service.search.disabled import AnySearch, SearchDisabled
from service.server_metrics import start_metrics
from service.store.append.appender import Appender
from service.store.db.database import Database
from service.store.db.dsn import Target
from service.store.epoch import EpochKeeper
from service.store.replica import create_lagging_database
from service.store.watch import WatchHub
from service.telemetry.loop_monitor import LoopMonitor

OWN_QUEUES = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        *(f"/{SERVICE}/{name}" for name in ("AppendMessages", "GetContext", "ListMessages")),
    }
)
"""Methods whose calls gRPC queues apart from those of the others."""
GC_THRESHOLDS = (10_000, 10, 10)
"""A call allocates many objects that a collection traverses, and that form no cycle. With the
default of 700, collections take 2% of the processor time of an append."""
REFUSE_BEFORE_CLOSE_S = 0.5
"""Seconds to keep rejecting new calls and flushing replies before the connections are closed.

Applies to a server that was in use when the drain began.
"""
RECENT_USE_S = 1.0
"""Seconds after its last call during which a server counts as in use.

Callers pause between one call and the next.
"""
GRPC_STOP_TIMEOUT_S = 1.0
"""Seconds that gRPC may take to stop after its connections were closed."""
LAST_WRITES_TIMEOUT_S = 2.0
"""Seconds that the writes of disconnected callers may take. None of them was acknowledged."""
SEARCH_STOP_TIMEOUT_S = 5.0
"""Seconds that search may take to stop."""

_log = structlog.get_logger(__name__)


class Server:
    """The complete service in one process. Call `start` and then `stop`, once each."""

    def __init__(self, settings: Settings, target: Target) -> None:
        """Create the components.

        Raises:
            BadConfiguration: A key or certificate cannot be used, or a package is not installed.
        """
        self.settings = settings
        self.certificates = credentials.load_certificates(settings)
        self.database = Database(
            target,
            pool_size=settings.db_pool_size,
            max_overflow=settings.db_max_overflow,
            pool_timeout_s=settings.db_pool_timeout,
            recycle_s=settings.db_pool_recycle,
            connect_timeout_s=settings.db_connect_timeout,
            hot_pool_size=settings.append_lanes + settings.read_connections,
        )
        self.authenticate = credentials.make_authenticator(
            settings, external_id_lookup(self.database)
        )
        self.readiness = Readiness(self.database)
        self.database.on_suspected_outage = self.readiness.request_probe
        self.epoch = EpochKeeper(self.database)
        self.readiness.on_success = self.epoch.check_soon
        self.lagging = create_lagging_database(settings, self.database, self.epoch)
        self.search = search = self._create_search()
        self.health = Health(self.database, self.readiness, search)
        self.appender = Appender(
            self.database,
            settings.append_lanes,
            search_enabled=search.indexes_messages,
            raises_synchronous_commit=settings.db_synchronous_commit == "on",
        )
        self.watchers = WatchHub(self.database, self.epoch)
        self.appender.on_appended = (
            self._on_indexed_append if search.indexes_messages else self._on_append
        )
        self.calls = Admission(settings.max_in_flight)
        self.streams = StreamAdmission(
            settings.max_watches, max(1, settings.max_calls_per_connection // 2)
        )
        self.budget = ByteBudget(
            settings.max_bytes_in_flight,
            min(settings.max_bytes_per_user, settings.max_bytes_in_flight),
            min(settings.max_bytes_per_connection, settings.max_bytes_in_flight),
        )
        self.untaken_calls = UntakenCalls()
        self.receiver = RequestReceiver(untaken=self.untaken_calls)
        self.unread_replies = UnreadReplies(self.budget, self._close_peers)
        self.connection_limit = ConnectionLimit(
            max(1, connection_count(settings.max_connections) // 2)
        )
        self.handshake_timeout_s = HANDSHAKE_TIMEOUT_S
        self.idle_timeout_s = IDLE_TIMEOUT_S
        self.metrics = start_metrics(self)
        self.loop_monitor = LoopMonitor(
            find_method, self.metrics.observe_loop_lag if self.metrics else None
        )
        self.address = settings.listen
        """Address the server listens on; after `start` with the actual port."""
        self._servers: list[tuple[aio.Server, int]] = []
        self._gc_thresholds = gc.get_threshold()

    async def start(self) -> None:
        """Listen. Calls are served as soon as the database responds and its schema fits.

        Raises:
            OSError: An address cannot be listened on.
        """
        settings = self.settings
        options = server_options(
            max_calls_per_connection=settings.max_calls_per_connection,
            max_connections=settings.max_connections,
            handshake_timeout_s=self.handshake_timeout_s,
            idle_timeout_s=self.idle_timeout_s,
        )
        server = create_server(options, OWN_QUEUES, self.untaken_calls)
        self._add_services(server)
        self.address, port = _listen(server, settings.listen, self.certificates)
        self._servers.append((server, port))
        self.connection_limit.start(port)
        if settings.health_listen is not None:
            health_server = aio.server(options=options)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, health_server)
            _, port = _listen(health_server, settings.health_listen)
            self._servers.append((health_server, port))
        for grpc_server, _ in self._servers:
            await grpc_server.start()
        # Objects that live as long as the process need not be traversed by every collection.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.readiness.request_probe()
        self.search.start()
        self.loop_monitor.start()

    def _add_services(self, server: aio.Server) -> None:
        """Add the service, the health service and reflection to a gRPC server."""
        settings = self.settings
        servicer = ChatHistoryServicer(
            self.database,
            self.appender,
            self.watchers,
            self.search,
            call_timeout_s=settings.call_timeout,
            page_token_key=(
                settings.page_token_key.get_secret_value() if settings.page_token_key else None
            ),
            lagging=self.lagging,
        )
        pipeline = Pipeline(
            self.authenticate,
            self.calls,
            self.streams,
            self.budget,
            settings.call_timeout,
            self.receiver,
            self.unread_replies,
            self.metrics.observe if self.metrics else None,
            AuditTrail(callers_are_identified=self.authenticate is not trust_all),
        )
        handlers = pipeline.handlers(DESCRIPTOR, servicer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(  # type: ignore[attr-defined] # missing in the stubs
            SERVICE, handlers
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = (
            SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, server)

    async def stop(self) -> None:
        """Report NOT_SERVING, finish calls in flight within the grace period, and close.

        No acknowledged write is lost. Each step has its own timeout, because clients, database and
        search may all be unresponsive.
        """
        loop = asyncio.get_running_loop()
        self.readiness.drain()
        await asyncio.sleep(self.settings.shutdown_delay)
        self.calls.is_draining = self.streams.is_draining = True
        try:
            # An open stream would otherwise use up the grace period.
            self.watchers.close()
            await self._drain_calls(loop.time() + self.settings.shutdown_grace)
        finally:
            # Whatever failed: gRPC must end before the tasks whose memory it writes into.
            self.health.close()
            await asyncio.gather(
                *(self._close_connections(server, port) for server, port in self._servers)
            )
        self.receiver.close()
        self.unread_replies.close()
        await self.connection_limit.stop()
        credentials.close_authenticator(self.authenticate)
        await _wait_at_most(LAST_WRITES_TIMEOUT_S, "history epoch", self.epoch.stop())
        await asyncio.gather(
            _wait_at_most(LAST_WRITES_TIMEOUT_S, "health checks", self.health.cancel_probes()),
            self.appender.drain(LAST_WRITES_TIMEOUT_S),
            _wait_at_most(SEARCH_STOP_TIMEOUT_S, "search", self.search.stop()),
        )
        await self.database.close(LAST_WRITES_TIMEOUT_S)
        if self.lagging is not None:
            await self.lagging.close()
        self.loop_monitor.stop()
        if self.metrics:
            self.metrics.close()
        gc.unfreeze()
        gc.set_threshold(*self._gc_thresholds)

    def _create_search(self) -> AnySearch:
        if self.settings.search == "off":
            return SearchDisabled()
        if problem := packages.find_problem(self.settings):
            raise BadConfiguration([problem])
        # Imported here so that a service without search does not load its packages.
        from service.search.service import Search  # noqa: PLC0415

        search = Search(self.settings, self.database, self.epoch, self.readiness.wait_ready)
        search.on_change = self.readiness.notify
        return search

    def _on_append(self, user_id: str, session_id: str) -> None:
        self.watchers.session_changed(user_id, session_id)
        self.epoch.wake()

    def _on_indexed_append(self, user_id: str, session_id: str) -> None:
        # The indexer raises the counter of the epoch.
        self.watchers.session_changed(user_id, session_id)
        self.search.wake()

    async def _drain_calls(self, deadline: float) -> None:
        """Wait until calls in flight have ended and their replies are flushed.

        New calls are rejected with DRAINING during that time, so that callers move to another
        replica.

        Args:
            deadline: Time of the event loop's clock at which to stop waiting.
        """
        loop = asyncio.get_running_loop()
        is_unused = time.monotonic() - self.calls.last_finished_at > RECENT_USE_S
        if is_unused and not self.calls.in_flight and not self.streams.in_flight:
            return
        # Polled, because a drain happens once: an event would cost every call.
        while self._has_calls_in_flight() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(REFUSE_BEFORE_CLOSE_S / 20)
        await asyncio.sleep(REFUSE_BEFORE_CLOSE_S)

    def _has_calls_in_flight(self) -> bool:
        # `stop` has ended the watches: the client of a watch that is still open does not read.
        return self.calls.in_flight > 0 or self.streams.in_flight > len(self.watchers)

    async def _close_connections(self, server: aio.Server, port: int) -> None:
        """Close the connections of a gRPC server, which ends its remaining calls, and stop it.

        With open connections, gRPC waits for every call that it knows of: also for a call that
        arrived at the moment of the stop, which gRPC neither hands over nor ends, and for a call
        whose request never arrives.
        """
        loop = asyncio.get_running_loop()
        # Queued back to back, so that nothing runs in between: clients whose connection is closed
        # reconnect immediately. The second pass closes the connections of those that succeeded.
        loop.call_soon(connections.close_connections, port)
        stopping = loop.create_task(server.stop(None))
        loop.call_soon(connections.close_connections, port)
        await _wait_at_most(GRPC_STOP_TIMEOUT_S, "gRPC", stopping)

    def _close_peers(self, peers: Collection[str]) -> None:
        """Close connections of clients, by gRPC's names of them."""
        _, port = self._servers[0]  # The health port has no other calls.
        connections.close_peers(port, peers)


def _listen(
    server: aio.Server, address: str, certificates: Certificates | None = None
) -> tuple[str, int]:
    """Listen on an address, in plaintext when there are no certificates.

    Returns:
        The address with the actual port, and the port.

    Raises:
        OSError: The address cannot be listened on.
    """
    host, _ = split_address(address)
    try:
        port = (
            server.add_secure_port(address, certificates.credentials())
            if certificates is not None
            else server.add_insecure_port(address)
        )
    except RuntimeError:
        port = 0
    if not port:
        raise OSError(errno.EADDRINUSE, "cannot listen on this address", address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", port


async def _wait_at_most(timeout_s: float, component: str, step: Awaitable[object]) -> None:
    """Wait for a step of the shutdown, and cancel it on timeout; the process ends soon after."""
    task = asyncio.ensure_future(step)
    _, unfinished = await asyncio.wait((task,), timeout=timeout_s)
    if unfinished:
        _log.warning("shutdown step timed out", component=component, timeout_s=timeout_s)
        task.cancel()
    else:
        task.result()
