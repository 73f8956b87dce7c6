"""The client of `chat-history reindex`, which makes a running server rebuild its search index."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NamedTuple

import grpc
from chathistory.v1 import search_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

from service.errors import ServiceError

# The server is on this machine or on the operator's network, so an HTTP proxy would not reach it.
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.keepalive_time_ms", 30_000)]


class TlsFiles(NamedTuple):
    """The files (PEM) to verify the server with, and to present to it."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


class ReindexProgress(NamedTuple):
    """Counts of documents and sessions."""

    total: int
    done: int
    failed: int


async def reindex(
    address: str, token: str | None, tls: TlsFiles | None
) -> AsyncGenerator[ReindexProgress]:
    """Start a rebuild, or follow the one in progress, and yield its progress until it is done.

    Raises:
        ServiceError: the server cannot be reached, or rejects the call; the message says why.
    """
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    async with _channel(address, tls) as channel:
        call = ChatHistoryServiceStub(channel).RebuildSearchIndex(
            search_pb2.RebuildSearchIndexRequest(), metadata=metadata
        )
        try:
            async for reply in call:
                yield ReindexProgress(reply.total_count, reply.done_count, reply.failed_count)
        except aio.AioRpcError as error:
            raise ServiceError(f"{error.code().name}: {error.details()}") from None


def _channel(address: str, tls: TlsFiles | None) -> aio.Channel:
    if tls is None:
        return aio.insecure_channel(address, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        tls.ca.read_bytes(),
        tls.key.read_bytes() if tls.key else None,
        tls.certificate.read_bytes() if tls.certificate else None,
    )
    return aio.secure_channel(address, credentials, options=_OPTIONS)
