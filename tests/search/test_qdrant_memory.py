"""The replaced parts of qdrant-client's local mode that hold points in memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client.local import local_collection
from qdrant_client.local.local_collection import LocalCollection

from service.search.types import Changes, Point, PointFilter, PointKind, VectorQuery, pack_vector
from service.search.worker import qdrant_memory
from service.search.worker.child import LocalIndex

DIMENSIONS = 8
USERS = ("user 0", "user 1")

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")


@pytest.fixture(autouse=True)
def restored_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test what `install` replaces in this process."""
    monkeypatch.setattr(LocalCollection, "load_vectors", LocalCollection.load_vectors)
    monkeypatch.setattr(
        local_collection,
        "calculate_distance",
        local_collection.calculate_distance,  # type: ignore[attr-defined]
    )


class Model:
    """An embedded index, and the points that it must hold."""

    def __init__(self, folder: Path, max_points: int) -> None:
        self._options = {
            "folder": str(folder / "qdrant"),
            "alias": "model",
            "dimensions": DIMENSIONS,
            "max_points": max_points,
        }
        self.index = LocalIndex()
        self.points: dict[Point, list[float]] = {}

    async def open(self) -> None:
        """Open the index, also again after `close`."""
        self.index = LocalIndex()
        await self.index.setup(self._options, b"")
        if not (await self.index.open(None, b""))[0]:
            await self.index.create_collection(None, b"")

    async def close(self) -> None:
        """Close the files."""
        assert self.index._client is not None
        await self.index._client.close()

    @property
    def collection(self) -> Any:
        """The collection of the package."""
        assert self.index._client is not None
        local: Any = self.index._client._client
        (collection,) = local.collections.values()
        return collection

    async def write(
        self,
        upserts: dict[Point, list[float]] | None = None,
        deletes: Sequence[Point] = (),
        filters: Sequence[PointFilter] = (),
    ) -> tuple[list[int], bool]:
        """Write changes; return the indexes of the refused upserts, and whether it is full."""
        upserts = upserts or {}
        argument = {
            "delete_filters": filters,
            "deletes": deletes,
            "upserts": list(upserts),
            "building": None,
            "mark": None,
        }
        vectors = b"".join(map(pack_vector, upserts.values()))
        (refused, is_full), _ = await self.index.write(argument, vectors)
        for point_filter in filters:
            for point in [p for p in self.points if p.user_id == point_filter.user_id]:
                del self.points[point]
        for point in deletes:
            self.points.pop(point, None)
        for n, (point, vector) in enumerate(upserts.items()):
            if n not in refused:
                self.points[point] = vector
        return refused, is_full

    async def check(self) -> None:
        """Check that searches return what the points are, nearest first."""
        query = [random.Random(len(self.points)).uniform(-1, 1) for _ in range(DIMENSIONS)]
        for user_id in USERS:
            vector_query = VectorQuery(PointKind.MESSAGE, [user_id], [], 1000)
            argument = list(vector_query)
            hits, _ = await self.index.search(argument, pack_vector(query))
            expected = {
                point: _cosine(query, vector)
                for point, vector in self.points.items()
                if point.user_id == user_id
            }
            scores: dict[Point, float] = dict(hits)
            assert scores.keys() == expected.keys()
            for point, score in expected.items():
                assert scores[point] == pytest.approx(score, abs=1e-5)
            assert [score for _, score in hits] == sorted(scores.values(), reverse=True)
            count, _ = await self.index.count(list(PointFilter(user_id)), b"")
            assert count == len(expected)


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    a, b = np.array(left), np.array(right)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def point_of(number: int) -> Point:
    return Point(USERS[number % 2], PointKind.MESSAGE, f"session {number % 3}", str(number))


def vector_of(rng: random.Random) -> list[float]:
    return [rng.uniform(-1, 1) for _ in range(DIMENSIONS)]


@pytest.mark.parametrize("part_points", [4, qdrant_memory.SEARCH_PART_POINTS])
async def test_random_changes_are_found_as_written_also_after_opening_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_points: int
) -> None:
    monkeypatch.setattr(qdrant_memory, "SEARCH_PART_POINTS", part_points)
    rng = random.Random(523)
    model = Model(tmp_path, 40)
    await model.open()
    was_refused = False
    for round_ in range(60):
        upserts = {point_of(rng.randrange(80)): vector_of(rng) for _ in range(rng.randrange(9))}
        deletes = [point_of(rng.randrange(80)) for _ in range(rng.randrange(6))]
        filters = [PointFilter(rng.choice(USERS))] if rng.random() < 0.05 else []
        kept = [point for point in deletes if point not in upserts]
        refused, _ = await model.write(upserts, kept, filters)
        was_refused = was_refused or bool(refused)
        assert len(model.points) <= 40
        await model.check()
        if round_ % 20 == 19:
            await model.close()
            await model.open()
            await model.check()
    assert was_refused, "the index was full at times"
    await model.close()


async def test_full_index_refuses_new_points_only(tmp_path: Path) -> None:
    rng = random.Random(1)
    model = Model(tmp_path, 10)
    await model.open()
    assert await model.write({point_of(n): vector_of(rng) for n in range(8)}) == ([], False)
    # One of the four is known, and two fit.
    upserts = {point_of(n): vector_of(rng) for n in (8, 3, 9, 10)}
    assert await model.write(upserts) == ([3], True)
    await model.check()
    changed = {point_of(n): vector_of(rng) for n in range(10)}
    assert await model.write(changed) == ([], True), "changes are accepted, and it is still full"
    assert await model.write(deletes=[point_of(0), point_of(1)]) == ([], True)
    assert await model.write({point_of(11): vector_of(rng)}) == ([], False)
    await model.check()
    await model.close()


async def test_index_with_more_points_than_the_limit_is_opened_and_takes_no_new_one(
    tmp_path: Path,
) -> None:
    rng = random.Random(2)
    model = Model(tmp_path, 30)
    await model.open()
    await model.write({point_of(n): vector_of(rng) for n in range(30)})
    await model.close()
    model._options["max_points"] = 20
    await model.open()
    await model.check()
    assert await model.write({point_of(30): vector_of(rng)}) == ([0], True)
    await model.write(deletes=[point_of(n) for n in range(15)])
    assert await model.write({point_of(30): vector_of(rng)}) == ([], False)
    await model.check()
    await model.close()


async def test_payloads_share_their_strings(tmp_path: Path) -> None:
    rng = random.Random(3)
    model = Model(tmp_path, 100)
    await model.open()
    await model.write({point_of(n): vector_of(rng) for n in range(12)})

    def distinct() -> dict[str, int]:
        payloads = model.collection.payload
        keys = {id(key) for payload in payloads for key in payload}
        fields = ("user_id", "kind", "entity_id")
        return {"keys": len(keys)} | {
            field: len({id(payload[field]) for payload in payloads}) for field in fields
        }

    expected = {"keys": 4, "user_id": 2, "kind": 1, "entity_id": 3}
    assert distinct() == expected
    await model.write({point_of(n): vector_of(rng) for n in range(6)})
    assert distinct() == expected, "also after changes"
    await model.close()
    await model.open()
    assert distinct() == expected
    await model.close()


def test_replaced_functions_are_those_of_the_package() -> None:
    for name, (function, _) in qdrant_memory.REPLACED.items():
        assert function.__module__.startswith("qdrant_client."), name


async def test_upserts_are_selected_with_their_vectors() -> None:
    points = [point_of(n) for n in range(4)]
    vectors = [pack_vector([float(n), 1.0]) for n in range(4)]
    changes = Changes([PointFilter("user")], points, points, b"".join(vectors))
    assert changes.upserts_only([1, 3]) == Changes(
        (), (), [points[1], points[3]], vectors[1] + vectors[3]
    )
    assert changes.upserts_only(range(4)) == Changes((), (), points, b"".join(vectors))
