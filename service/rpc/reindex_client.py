"""Asks a running server to rebuild its search index: the other end of `chat-history reindex`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NamedTuple

import grpc
from chathistory.v1 import search_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

from service.errors import ServiceError

# A running server on this machine is not behind anybody's proxy.
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.keepalive_time_ms", 30_000)]


class Tls(NamedTuple):
    """How to know the server, and what to show it, as files of PEM."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


class Rebuilt(NamedTuple):
    """How far it is: documents and sessions."""

    total: int
    done: int
    failed: int


async def rebuild(address: str, token: str | None, tls: Tls | None) -> AsyncGenerator[Rebuilt]:
    """Start the work, or follow it when it is under way, and tell how far it is until it is done.

    Raises:
        ServiceError: the server refuses or cannot be reached; the message says why.
    """
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with _channel(address, tls) as channel:
        call = ChatHistoryServiceStub(channel).RebuildSearchIndex(
            search_pb2.RebuildSearchIndexRequest(), metadata=metadata
        )
        try:
            async for reply in call:
                yield Rebuilt(reply.total_count, reply.done_count, reply.failed_count)
        except aio.AioRpcError as error:
            raise ServiceError(f"{error.code().name}: {error.details()}") from None


def _channel(address: str, tls: Tls | None) -> aio.Channel:
    if tls is None:
        return aio.insecure_channel(address, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(),
        tls.key.read_bytes() if tls.key else None,
        tls.certificate.read_bytes() if tls.certificate else None,
    )
    return aio.secure_channel(address, credentials, options=_OPTIONS)
