"""Fixtures: a client of the server under test, and a user."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from chathistory_client import ChatHistoryClient
from service.server import Server
from tests.support.clients import client_of


@pytest.fixture
async def client(server: Server) -> AsyncGenerator[ChatHistoryClient]:
    """A client of the server. Every caller is a service."""
    async with client_of(server.address) as opened:
        yield opened


@pytest.fixture
async def owner(client: ChatHistoryClient) -> str:
    """The id of a new user."""
    return (await client.create_user(name="Ada")).id
