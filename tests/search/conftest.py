"""Tests of documents and search: the embedded index, in a folder of the test's own."""

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
    """Give the service with search on."""
    async with serving(database_url, search="on", data_dir=tmp_path) as started:
        await wait_until_searchable(started)
        yield started


@pytest.fixture
def library(chat: Chat) -> Library:
    """Give documents and search as the user's."""
    return Library(chat)


@pytest.fixture
def others(other: Chat) -> Library:
    """Give documents and search as another user's."""
    return Library(other)


@pytest.fixture
async def qdrant() -> AsyncGenerator[QdrantServer]:
    """Give a Qdrant to be reached over gRPC."""
    served = QdrantServer()
    await served.start()
    yield served
    await served.stop()
    await served.engine.close()


@pytest.fixture
def remote(qdrant: QdrantServer) -> dict[str, Any]:
    """Give the settings of a service that uses it."""
    return {
        "search": "on",
        "QDRANT_URL": qdrant.url,
        "qdrant_grpc_port": qdrant.port,
        "search_timeout": 3.0,
    }
