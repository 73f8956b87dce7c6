"""Fixtures: a chatbot that uses the server under test, and its clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from service.server import Server
from tests.support.chatbots import Browser, ModelServer, serving_chatbot

OpenBrowser = Callable[[], Awaitable[Browser]]


@pytest.fixture
async def bot(server: Server) -> AsyncGenerator[str]:
    """Yield the address of a chatbot without a model."""
    async with serving_chatbot(server.address) as address:
        yield address


@pytest.fixture
async def browser(bot: str) -> AsyncGenerator[Browser]:
    """Yield a client of that chatbot, with its own cookies."""
    async with Browser(bot) as browser:
        yield browser


@pytest.fixture
async def other_browser(bot: str) -> AsyncGenerator[Browser]:
    """Yield a client that is another user."""
    async with Browser(bot) as browser:
        yield browser


@pytest.fixture
async def model() -> ModelServer:
    """Return a model that is not served yet."""
    return ModelServer()


@pytest.fixture
async def model_browser(server: Server, model: ModelServer) -> AsyncGenerator[Browser]:
    """Yield a client of a chatbot that uses `model`."""
    async with AsyncExitStack() as stack:
        settings = await stack.enter_async_context(model.serving())
        address = await stack.enter_async_context(serving_chatbot(server.address, **settings))
        yield await stack.enter_async_context(Browser(address))
