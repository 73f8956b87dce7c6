"""Clients for tests."""

from __future__ import annotations

from typing import Any

from chathistory_client import ChatHistoryClient

# No call may pass through a proxy of the machine's, or wait for an earlier test's broken connection.
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def client_of(
    address: str, *, options: list[tuple[str, int | str]] | None = None, **settings: Any
) -> ChatHistoryClient:
    """Make a client, to be used as a context manager."""
    return ChatHistoryClient(address, options=OPTIONS + (options or []), **settings)
