"""A client of the server under test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from chathistory_client import ChatHistoryClient
from service.server import Server
from tests.support.clients import client_of


@pytest.fixture
async def client(server: Server) -> AsyncGenerator[ChatHistoryClient]:
    """Give a client of the server; every caller is a service."""
    async with client_of(server.address) as opened:
        yield opened


@pytest.fixture
async def owner(client: ChatHistoryClient) -> str:
    """Give the id of a fresh user."""
    return (await client.create_user(name="somebody")).id
