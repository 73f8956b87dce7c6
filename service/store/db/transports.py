"""Opens a connection with or without TLS, as `sslmode` says.

The driver's own `prefer` would read a certificate and a key in the home folder.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import asyncpg

from service.store.db.db_errors import sqlstate


class Transports:
    """Opens connections of one target."""

    def __init__(self) -> None:
        self._unverified = _unverified_tls()

    async def open(self, options: dict[str, Any]) -> asyncpg.Connection:
        """Open one connection; `prefer` and `allow` try both transports, as in libpq.

        Args:
            options: The arguments of `asyncpg.connect`.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError: connecting failed.
        """
        transports: list[ssl.SSLContext | bool]
        match options.get("ssl"):
            case "prefer":
                transports = [self._unverified, False]
            case "allow":
                transports = [False, self._unverified]
            case _:
                connection: asyncpg.Connection = await asyncpg.connect(**options)
                return connection
        async with asyncio.timeout(options.get("timeout")):
            try:
                connection = await asyncpg.connect(**options | {"ssl": transports[0]})
            except (ConnectionError, ssl.SSLError, asyncpg.PostgresError) as error:
                if not _is_about_transport(error):
                    raise
                connection = await self._open_otherwise(options | {"ssl": transports[1]}, error)
        return connection

    @staticmethod
    async def _open_otherwise(options: dict[str, Any], refusal: Exception) -> asyncpg.Connection:
        try:
            connection: asyncpg.Connection = await asyncpg.connect(**options)
        except (ConnectionError, ssl.SSLError):
            if isinstance(refusal, asyncpg.PostgresError):
                # The server's own reason is clearer than a second transport that does not work.
                raise refusal from None
            raise
        return connection


def _unverified_tls() -> ssl.SSLContext:
    """Return TLS without verification, as in libpq's `prefer` and `allow`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _is_about_transport(error: BaseException) -> bool:
    """Return whether the server has no TLS, or accepts this client with the other transport only.

    A server without a process for the client reports that before TLS, which the driver rejects.
    """
    return (
        isinstance(error, ssl.SSLError)
        or sqlstate(error) == "28000"
        or "rejected SSL upgrade" in str(error)
        or "during SSL exchange" in str(error)
    )
