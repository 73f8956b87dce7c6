"""Writes to a Qdrant: how much the event loop converts at a time."""

from __future__ import annotations

from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient, models

from service.search.qdrant import MAX_UPSERT_NUMBERS, QdrantIndex
from service.search.types import (
    MARK_POINT,
    Changes,
    Point,
    PointFilter,
    PointKind,
    VectorQuery,
    pack_vector,
)
from service.store.history_mark import Mark

DIMENSIONS = 4096


class RecordingClient:
    """A client of Qdrant that records the points of each upsert."""

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.upserts: list[list[models.PointStruct]] = []

    async def delete(
        self, _collection: str, _points: models.PointIdsList, wait: bool
    ) -> models.UpdateResult:
        assert wait
        self.operations.append("delete")
        return models.UpdateResult(operation_id=1, status=models.UpdateStatus.COMPLETED)

    async def upsert(
        self,
        _collection: str,
        points: list[models.PointStruct],
        wait: bool,
    ) -> models.UpdateResult:
        assert wait
        self.operations.append("upsert")
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


@pytest.mark.parametrize("has_deletes", [False, True])
async def test_mark_is_stored_before_the_changes(has_deletes: bool) -> None:
    """A write that is cut off then leaves a mark that is too high, and never one too low."""
    client: Any = RecordingClient()
    index = QdrantIndex(client, "alias", DIMENSIONS)
    point = Point("user", PointKind.CHUNK, "document", "1")
    vector = pack_vector([1.0] * DIMENSIONS)
    deletes = [Point("user", PointKind.CHUNK, "document", "2")] if has_deletes else []
    await index.write(Changes((), deletes, [point], vector, Mark("epoch", 7)), building=None)
    assert client.operations == (["upsert", "delete", "upsert"] if has_deletes else ["upsert"])
    mark, *others = [point for part in client.upserts for point in part]
    assert mark.id == MARK_POINT.id
    assert mark.payload == {**MARK_POINT._asdict(), "epoch": "epoch", "counter": 7}
    assert [other.payload for other in others] == [point._asdict()]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
async def test_only_the_collection_that_is_built_gets_the_mark() -> None:
    client = AsyncQdrantClient(location=":memory:")
    index = QdrantIndex(client, "alias", 2)
    live = await index.create_collection(Mark("old", 9))
    building = await index.create_collection(Mark("new", 1))
    assert await index.live_collection() == live
    point = Point("user", PointKind.CHUNK, "document", "1")
    changes = Changes(upserts=[point], vectors=pack_vector([1.0, 0.0]), mark=Mark("new", 2))
    await index.write(changes, building)
    assert await index.read_mark() == Mark("old", 9)
    assert await index.read_mark(building) == Mark("new", 2)
    assert await index.has_collection(building)
    await index.publish(building)
    assert await index.read_mark() == Mark("new", 2)
    assert not await index.has_collection(live)
    # The mark is found by no search, and is deleted with no user.
    query = VectorQuery(PointKind.CHUNK, ["user", ""], [], 10)
    assert [hit.point for hit in await index.search(pack_vector([1.0, 0.0]), query)] == [point]
    await index.write(Changes([PointFilter("user")], mark=Mark("new", 3)), None)
    assert await index.read_mark() == Mark("new", 3)
    await index.close()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
async def test_index_of_a_build_without_marks_has_none() -> None:
    client = AsyncQdrantClient(location=":memory:")
    index = QdrantIndex(client, "alias", 2)
    await index.create_collection()
    assert await index.read_mark() is None
    await index.close()
