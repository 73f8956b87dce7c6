"""Health of the service, by the standard `grpc.health.v1` API."""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum
from typing import TYPE_CHECKING

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from grpc import aio

from chathistory_client.connection import Connection
from chathistory_client.errors import Unavailable

if TYPE_CHECKING:
    _Check = aio.UnaryUnaryMultiCallable[StringValue, Int32Value]

HEALTH_TIMEOUT_S = 2.0
_SERVING = 1
"""HealthCheckResponse.SERVING."""
_POLL_INTERVAL_S = 0.2


class HealthStatus(StrEnum):
    """Health of one name."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"
    """The service does not know the name."""
    UNREACHABLE = "unreachable"
    """The service did not respond."""


class Health(Connection):
    """Checks the health of the service. No token is required."""

    async def check_health(
        self, name: str = "", *, timeout: float = HEALTH_TIMEOUT_S
    ) -> HealthStatus:
        """Return the health of the service or of one component.

        An unreachable service is a status, not an error.

        A check of `"database"` reads and commits in PostgreSQL. Do not probe it periodically,
        because that keeps a database awake that would suspend itself when idle.

        >>> await client.check_health("database")
        <HealthStatus.SERVING: 'serving'>

        Args:
            name: `""` for readiness, `"reads"` or `"writes"` for one half of it, or `"liveness"`,
                `"database"` or `"search"`.
            timeout: Seconds to wait for the response.
        """
        # HealthCheckRequest is one string and HealthCheckResponse one enum. The well-known wrappers
        # have the same wire format, which saves the dependency on grpcio-health-checking.
        check: _Check = self._pool.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int32Value.FromString,
        )
        try:
            response = await check(StringValue(value=name), timeout=timeout)
        except aio.AioRpcError as error:
            is_unknown = error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)
            return HealthStatus.UNKNOWN if is_unknown else HealthStatus.UNREACHABLE
        return HealthStatus.SERVING if response.value == _SERVING else HealthStatus.NOT_SERVING

    async def wait_until_ready(self, *, timeout: float = 30.0) -> None:
        """Wait until the service is ready to serve calls.

        >>> await client.wait_until_ready()

        Args:
            timeout: Seconds to wait.

        Raises:
            Unavailable: The service was not ready in time.
        """
        deadline = time.monotonic() + timeout
        remaining_s = timeout
        while True:
            status = await self.check_health(timeout=min(HEALTH_TIMEOUT_S, remaining_s))
            if status is HealthStatus.SERVING:
                return
            await asyncio.sleep(min(_POLL_INTERVAL_S, deadline - time.monotonic()))
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise Unavailable(
                    f"the service is not ready after {timeout:g} s ({status})",
                    code=grpc.StatusCode.UNAVAILABLE,
                )
