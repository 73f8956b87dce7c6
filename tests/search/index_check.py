"""Compares a Qdrant with what PostgreSQL holds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.search.service import Search
from service.search.types import Point, PointKind, unpack_vector
from service.server import Server
from tests.search.library import Library
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import wait_until_indexed, wait_until_searchable
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.servers import connected, serving


@asynccontextmanager
async def searchable(url: str, settings: dict[str, Any]) -> AsyncGenerator[tuple[Server, Library]]:
    """Yield a server whose search responds, and a new user's library."""
    async with serving(url, **settings) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        yield server, Library(await Chat.of_new_user(stub))


async def assert_index_equals_postgres(url: str, server: Server, qdrant: QdrantServer) -> None:
    """Wait until everything is indexed, and compare all points and vectors."""
    await wait_until_indexed(server)
    (collection,) = await qdrant.live_collections()
    points = await qdrant.points(collection)
    vectors = await _expected_vectors(url, server)
    assert points.keys() == vectors.keys()
    for id_, (payload, vector) in points.items():
        assert set(payload) == {"user_id", "kind", "entity_id", "item"}, "points carry ids only"
        assert Point(**payload).id == id_
        assert vector == pytest.approx(unpack_vector(vectors[id_]), abs=1e-4)


async def _expected_vectors(url: str, server: Server) -> dict[str, bytes]:
    """Return the vectors that the index must hold, by point id."""
    chunks = await fetch(
        url,
        "SELECT user_id::text, document_id::text, chunk_index::text, left(text, 8192), vector "
        "FROM document_chunks",
    )
    messages = await fetch(
        url,
        "SELECT user_id::text, session_id::text, id::text, left(content, 8192), NULL "
        "FROM chat_messages WHERE deleted_at IS NULL AND btrim(content) <> ''",
    )
    assert isinstance(server.search, Search)
    assert server.search._embeddings is not None
    vectors: dict[str, bytes] = {}
    for kind, rows in ((PointKind.CHUNK, chunks), (PointKind.MESSAGE, messages)):
        for user_id, entity_id, item, text, given_vector in rows:
            point = Point(user_id, kind, entity_id, item)
            vectors[point.id] = given_vector or await server.search._embeddings.embed([text])
    return vectors
