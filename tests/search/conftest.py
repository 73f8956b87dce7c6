"""Fixtures of documents and search. By default the index is embedded, in the test's own folder."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from service.server import Server
from tests.search.library import Library
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import wait_until_searchable
from tests.support.chat import Chat
from tests.support.servers import serving


@pytest.fixture
async def server(database_url: str, tmp_path: Path) -> AsyncGenerator[Server]:
    """Yield a server with search on."""
    async with serving(database_url, search="on", data_dir=tmp_path) as server:
        await wait_until_searchable(server)
        yield server


@pytest.fixture
def library(chat: Chat) -> Library:
    """Return documents and search of the user."""
    return Library(chat)


@pytest.fixture
def others(other: Chat) -> Library:
    """Return documents and search of another user."""
    return Library(other)


@pytest.fixture
async def qdrant() -> AsyncGenerator[QdrantServer]:
    """Yield a Qdrant that serves gRPC."""
    qdrant = QdrantServer()
    await qdrant.start()
    yield qdrant
    await qdrant.stop()
    await qdrant.engine.close()


@pytest.fixture
def remote(qdrant: QdrantServer) -> dict[str, Any]:
    """Return the settings of a service that uses this Qdrant."""
    return qdrant.settings
