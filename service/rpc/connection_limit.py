"""Closes the connections of addresses that open too many, so that others can still connect."""

from __future__ import annotations

import asyncio

import structlog

from service.rpc import connections

CHECK_INTERVAL_S = 5.0

_log = structlog.get_logger(__name__)


class ConnectionLimit:
    """Checks the connections of a port regularly.

    gRPC limits their total only (`grpc.max_allowed_incoming_connections`), which one address could
    use up.
    """

    def __init__(self, per_address: int, interval_s: float = CHECK_INTERVAL_S) -> None:
        """Set the limit of one address, and the time between two checks in seconds."""
        self.per_address = per_address
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self, port: int) -> None:
        """Check a port until `stop`."""
        self._task = asyncio.get_running_loop().create_task(self._check(port))

    async def stop(self) -> None:
        """Stop the checks."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _check(self, port: int) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            # In a thread, since it looks at every descriptor of the process.
            closed = await asyncio.to_thread(connections.close_excess, port, self.per_address)
            for address, count in closed.items():
                _log.warning(
                    "connections closed because their address has too many",
                    address=address,
                    connections=count,
                    limit=self.per_address,
                )
