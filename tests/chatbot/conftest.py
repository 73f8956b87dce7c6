"""A chatbot before the server under test."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from service.server import Server
from tests.support.chatbots import Browser, Model, chatting

OpenBrowser = Callable[[], Awaitable[Browser]]


@pytest.fixture
async def bot(server: Server) -> AsyncGenerator[str]:
    """Give the address of a chatbot that has no model."""
    async with chatting(server.address) as address:
        yield address


@pytest.fixture
async def browser(bot: str) -> AsyncGenerator[Browser]:
    """Give a browser on it."""
    async with Browser(bot) as opened:
        yield opened


@pytest.fixture
async def stranger(bot: str) -> AsyncGenerator[Browser]:
    """Give another one, with cookies of its own."""
    async with Browser(bot) as opened:
        yield opened


@pytest.fixture
async def model() -> Model:
    """Give a model that is not served yet."""
    return Model()


@pytest.fixture
async def clever(server: Server, model: Model) -> AsyncGenerator[Browser]:
    """Give a browser on a chatbot that has a model."""
    async with AsyncExitStack() as stack:
        settings = await stack.enter_async_context(model.serving())
        address = await stack.enter_async_context(chatting(server.address, **settings))
        yield await stack.enter_async_context(Browser(address))
