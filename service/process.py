"""Runs the server as a process, until a signal ends it."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
from collections.abc import Callable
from contextlib import suppress

import structlog

from service.config import Settings
from service.server import Server
from service.store.db.dsn import Target
from service.store.db.durability import log_weaknesses

EXIT_TIMEOUT_S = 15.0
"""Seconds after the grace period by which the process ends even if a component hangs."""

_log = structlog.get_logger(__name__)


async def run(
    settings: Settings,
    target: Target,
    *,
    on_ready: Callable[[str], None] = lambda _address: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGINT or SIGTERM, drain, and return.

    If the process has not ended EXIT_TIMEOUT_S seconds after the grace period, the stacks of all
    threads are written to standard error and the process exits.

    Args:
        settings: The configuration.
        target: The database.
        on_ready: Called once, with the address, as soon as calls are served.
        stop_requested: Returns True if a signal arrived before this function handles signals. In
            that case nothing is started.

    Raises:
        OSError: An address cannot be listened on.
        UnusableDatabase: The database does not fit, by the first contact.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stopping.set)
    if stop_requested():
        return
    for note in target.notes:
        _log.info("connection string", note=note)
    server = Server(settings, target)
    try:
        await server.start()
        stop_task = loop.create_task(stopping.wait())
        ready_task = loop.create_task(server.readiness.wait_ready())
        refused_task = loop.create_task(server.database.locator.wait_refused())
        tasks = (stop_task, ready_task, refused_task)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if ready_task.done():
            connector = server.database.connector
            route = connector.route.value if connector.route else ""
            _log.info("database route", route=route, evidence=connector.evidence)
            await log_weaknesses(
                server.database, raises_synchronous_commit=settings.db_synchronous_commit == "on"
            )
            on_ready(server.address)
        elif refused_task.done():
            raise refused_task.result()  # To wait would not help.
        refused_task.cancel()
        await stop_task
        ready_task.cancel()
        with suppress(asyncio.CancelledError):
            await ready_task
    finally:
        # The watchdog needs neither the event loop nor the interpreter's lock. It raises when there
        # is no standard error to write to.
        timeout_s = settings.shutdown_delay + settings.shutdown_grace + EXIT_TIMEOUT_S
        with suppress(RuntimeError, ValueError, OSError):
            faulthandler.dump_traceback_later(timeout_s, exit=True)
        await server.stop()
