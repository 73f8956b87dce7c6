"""Writes to a Qdrant: how much the event loop converts at a time."""

from __future__ import annotations

from typing import Any

import pytest
from qdrant_client import models

from service.search.qdrant import MAX_UPSERT_NUMBERS, QdrantIndex
from service.search.types import Changes, Point, PointKind, pack_vector

DIMENSIONS = 4096


class RecordingClient:
    """A client of Qdrant that records the points of each upsert."""

    def __init__(self) -> None:
        self.upserts: list[list[models.PointStruct]] = []

    async def upsert(
        self,
        _collection: str,
        points: list[models.PointStruct],
        wait: bool,
    ) -> models.UpdateResult:
        assert wait
        self.upserts.append(points)
        return models.UpdateResult(operation_id=1, status=models.UpdateStatus.COMPLETED)


@pytest.mark.parametrize("count", [1, 16, 100])
async def test_large_writes_are_converted_and_sent_in_parts(count: int) -> None:
    client: Any = RecordingClient()
    index = QdrantIndex(client, "alias", DIMENSIONS)
    upserts = [Point("user", PointKind.CHUNK, "document", str(n)) for n in range(count)]
    vectors = b"".join(pack_vector([float(n)] * DIMENSIONS) for n in range(count))
    await index.write(Changes(upserts=upserts, vectors=vectors), building=None)
    sent = [point for part in client.upserts for point in part]
    assert [point.payload for point in sent] == [point._asdict() for point in upserts]
    for n, point in enumerate(sent):
        assert isinstance(point.vector, list)
        assert point.vector == [float(n)] * DIMENSIONS
    assert max(len(part) * DIMENSIONS for part in client.upserts) <= MAX_UPSERT_NUMBERS


async def test_write_that_only_deletes_upserts_nothing() -> None:
    client: Any = RecordingClient()
    await QdrantIndex(client, "alias", DIMENSIONS).write(Changes(), building=None)
    assert client.upserts == []
