"""How the service is, by its standard health service."""

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
_POLL_INTERVAL_S = 0.2


class HealthStatus(StrEnum):
    """What is known of a name."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    UNKNOWN = "unknown"
    """The service knows no such name."""
    UNREACHABLE = "unreachable"
    """The service did not answer."""


class Health(Connection):
    """Asks how the service is. No token is needed."""

    async def check_health(
        self, name: str = "", *, timeout: float = HEALTH_TIMEOUT_S
    ) -> HealthStatus:
        """Ask for `""` (ready), `"liveness"`, `"search"` or `"database"`; does not raise.

        `"database"` is a real round trip to PostgreSQL: for people and a `/db-health`, never for a periodic probe, since it
        keeps a database that suspends itself awake.

        >>> await client.check_health("database")
        <HealthStatus.SERVING: 'serving'>
        """
        # HealthCheckRequest is one string and HealthCheckResponse one enum, so the well-known wrappers have their wire form,
        # and no further package is needed.
        check: _Check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int32Value.FromString,
        )
        try:
            answer = await check(StringValue(value=name), timeout=timeout)
        except aio.AioRpcError as error:
            known = error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)
            return HealthStatus.UNREACHABLE if known else HealthStatus.UNKNOWN
        return HealthStatus.SERVING if answer.value == _SERVING else HealthStatus.NOT_SERVING

    async def wait_until_ready(self, *, timeout: float = 30.0) -> None:
        """Wait until the service serves calls.

        >>> await client.wait_until_ready()

        Raises:
            Unavailable: it does not in time.
        """
        deadline = time.monotonic() + timeout
        while (status := await self.check_health()) is not HealthStatus.SERVING:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the service is not ready after {timeout:g} s ({status})",
                    code=grpc.StatusCode.UNAVAILABLE,
                )
            await asyncio.sleep(_POLL_INTERVAL_S)
