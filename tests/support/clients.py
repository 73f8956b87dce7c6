"""Instances of the asynchronous client for tests."""

from __future__ import annotations

from typing import Any

from chathistory_client import ChatHistoryClient

# No call may use the machine's HTTP proxy or wait for the broken connection of an earlier test.
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


def client_of(
    address: str, *, options: list[tuple[str, int | str]] | None = None, **settings: Any
) -> ChatHistoryClient:
    """Return a client, to be used as a context manager."""
    return ChatHistoryClient(address, options=OPTIONS + (options or []), **settings)
