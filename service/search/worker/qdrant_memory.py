"""Bounds the memory of qdrant-client's local mode, which holds every point in memory.

The package keeps up to three times the memory of the vectors while a collection grows, and a dict
with strings of its own for each point. It opens a collection by way of ten kilobytes of Python
objects for each point, and copies all vectors for each search. This module replaces these parts:
vectors have memory of their own size, payloads share their strings, stored points are read one by
one, and a search compares the vectors in parts. A collection has room for a fixed number of points.

Like `qdrant_local.py`, which checks and applies the replacements, it reaches into private
attributes of the package. Only the search process imports it.
"""

from __future__ import annotations

import pickle
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client.local import distances, local_collection
from qdrant_client.local.local_collection import EPSILON, LocalCollection
from qdrant_client.local.utils import normalize_point_id

MAX_POINTS = 250_000
"""Default of the points of a collection; CHAT_HISTORY_INDEX_MAX_POINTS changes it."""
SEARCH_PART_POINTS = 8_192
"""Points that a search compares at a time: 8 MiB for the offline embeddings."""
FREE_SHARE = 0.01
"""Share of all points that must be free, or deleted, before they count as room again."""

_VECTOR = ""
"""The package's name of a vector without a name."""
_SHARED_FIELDS = ("user_id", "kind", "entity_id")
"""Fields of a payload whose values many points have in common."""

REPLACED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "load_vectors": (LocalCollection.load_vectors, ["self"]),
    "_add_point": (LocalCollection._add_point, ["self", "point"]),  # noqa: SLF001
    "calculate_distance": (
        distances.calculate_distance,
        ["query", "vectors", "distance_type"],
    ),
}
"""The replaced functions with their parameters, by name."""

_load_vectors = LocalCollection.load_vectors
_calculate_distance = distances.calculate_distance


def install(max_points: int) -> None:
    """Replace how collections are opened and searched in this process.

    Args:
        max_points: Points for which a collection reserves memory. Unused memory costs nothing.
    """

    def load_vectors(collection: Any) -> None:
        _load(collection, max_points)

    package: Any = local_collection
    package.LocalCollection.load_vectors = load_vectors
    package.calculate_distance = _calculate_distance_in_parts


def _calculate_distance_in_parts(query: Any, vectors: Any, distance_type: Any) -> Any:
    """Return the distances of all vectors; the original copies the vectors that it compares."""
    if len(vectors) <= SEARCH_PART_POINTS:
        return _calculate_distance(query, vectors, distance_type)
    return np.concatenate(
        [
            _calculate_distance(query, vectors[start : start + SEARCH_PART_POINTS], distance_type)
            for start in range(0, len(vectors), SEARCH_PART_POINTS)
        ],
        axis=-1,
    )


def _load(collection: Any, max_points: int) -> None:
    """Read the stored points of a collection one by one."""
    has_one_vector = list(collection.vectors) == [_VECTOR]
    if collection.storage is None or not has_one_vector or collection.sparse_vectors:
        _load_vectors(collection)
        return
    database: sqlite3.Connection = collection.storage.storage
    (count,) = database.execute("SELECT count(*) FROM points").fetchone()
    vectors = _reserve(max(count, max_points), collection.vectors[_VECTOR].shape[1])
    payloads = _Payloads()
    for point in _read_points(collection.storage, collection.ids):
        index = len(collection.ids)
        vectors[index] = point.vector if isinstance(point.vector, list) else point.vector[_VECTOR]
        payloads.append(point.payload or {})
        collection.ids[point.id] = index
        collection.ids_inv.append(point.id)
    collection.payload = payloads
    collection.vectors[_VECTOR] = vectors
    collection.deleted = np.zeros(len(payloads), dtype=bool)
    collection.deleted_per_vector[_VECTOR] = np.zeros(len(payloads), dtype=bool)


def _read_points(storage: Any, known_ids: dict[str, int]) -> Iterator[Any]:
    """Yield the stored points, as `CollectionPersistence.load` does from a list of all of them."""
    storage._legacy_keys = {}  # noqa: SLF001
    outdated: list[int] = []
    rows = storage.storage.execute("SELECT rowid, id, point FROM points ORDER BY rowid DESC")
    for row_id, key, value in rows:
        point = pickle.loads(value)  # noqa: S301 - this process wrote the file
        point.id = normalize_point_id(point.id)
        if point.id in known_ids:
            outdated.append(row_id)
            continue
        if key != storage.encode_key(point.id):
            storage._legacy_keys[point.id] = key  # noqa: SLF001
        yield point
    if outdated:
        storage._remove_outdated(outdated)  # noqa: SLF001


def _reserve(count: int, dimensions: int) -> NDArray[np.float32]:
    """Return memory for vectors, which the system provides when it is first written."""
    return np.zeros((count, dimensions), dtype=np.float32)


class _Payloads(list[dict[str, Any]]):
    """The payloads of a collection, which share their keys and the values of _SHARED_FIELDS."""

    def __init__(self, payloads: Iterable[dict[str, Any]] = ()) -> None:
        self._strings: dict[str, str] = {}
        super().__init__(map(self._share, payloads))

    def append(self, payload: dict[str, Any]) -> None:
        super().append(self._share(payload))

    def __setitem__(self, index: Any, payload: Any) -> None:
        super().__setitem__(index, self._share(payload))

    def _share(self, payload: dict[str, Any]) -> dict[str, Any]:
        strings = self._strings
        return {
            sys.intern(field): strings.setdefault(value, value)
            if field in _SHARED_FIELDS
            else value
            for field, value in payload.items()
        }


class AddPoint:
    """Adds points to a collection in memory that is reserved, as `LocalCollection._add_point`."""

    def __init__(self, collection: Any, max_points: int, on_compaction: Callable[[], None]) -> None:
        """Reserve the memory, unless the collection was opened after `install`.

        Args:
            collection: A `LocalCollection` with one vector without a name.
            max_points: Points for which the collection has room.
            on_compaction: Called when the points have changed their places.
        """
        self._collection = collection
        self._max_points = max_points
        self._on_compaction = on_compaction
        vectors = collection.vectors[_VECTOR]
        count = len(collection.ids)
        capacity = max(count, max_points)
        if len(vectors) < capacity:
            reserved = _reserve(capacity, vectors.shape[1])
            reserved[:count] = vectors[:count]
            collection.vectors[_VECTOR] = vectors = reserved
        if not isinstance(collection.payload, _Payloads):
            collection.payload = _Payloads(collection.payload)
        self._vectors = vectors
        self._deleted = np.zeros(len(vectors), dtype=bool)
        self._deleted[:count] = collection.deleted[:count]
        self._deleted_vectors = np.zeros(len(vectors), dtype=bool)
        self._deleted_vectors[:count] = collection.deleted_per_vector[_VECTOR][:count]
        self._show(count)

    def __call__(self, point: Any) -> None:
        """Add a point that the collection does not have."""
        collection = self._collection
        index = len(collection.ids)
        vector = np.asarray(point.vector, dtype=np.float32)
        norm = np.linalg.norm(vector)
        self._vectors[index] = vector / norm if norm > EPSILON else vector
        self._deleted[index] = self._deleted_vectors[index] = False
        collection.ids[point.id] = index
        collection.ids_inv.append(point.id)
        collection.payload.append(point.payload or {})
        self._show(index + 1)

    def _show(self, count: int) -> None:
        """Let the collection see the marks of its points, as arrays of its length."""
        self._collection.deleted = self._deleted[:count]
        self._collection.deleted_per_vector[_VECTOR] = self._deleted_vectors[:count]

    @property
    def free_count(self) -> int:
        """Points for which there is room."""
        return max(0, self._max_points - len(self._collection.ids))

    @property
    def min_free_count(self) -> int:
        """Free points from which on a full collection counts as having room again."""
        return max(1, round(self._max_points * FREE_SHARE))

    def find_room(self, ids: Sequence[str]) -> set[str]:
        """Return those ids of points to be written for which there is no room."""
        new_ids = self._new(ids)
        if len(new_ids) > self.free_count:
            deleted_count = int(np.count_nonzero(self._collection.deleted))
            if deleted_count >= self.min_free_count:
                self._compact()
                new_ids = self._new(ids)
        return set(new_ids[self.free_count :])

    def _new(self, ids: Sequence[str]) -> list[str]:
        return [point_id for point_id in dict.fromkeys(ids) if point_id not in self._collection.ids]

    def _compact(self) -> None:
        """Remove deleted points, whose places the package never uses again."""
        collection = self._collection
        kept = np.flatnonzero(~self._deleted[: len(collection.ids)])
        # In parts, since each part is copied. A point never moves to a later place.
        for start in range(0, len(kept), SEARCH_PART_POINTS):
            part = kept[start : start + SEARCH_PART_POINTS]
            self._vectors[start : start + len(part)] = self._vectors[part]
            self._deleted_vectors[start : start + len(part)] = self._deleted_vectors[part]
        self._deleted[:] = False
        collection.payload = _Payloads(collection.payload[index] for index in kept)
        collection.ids_inv = [collection.ids_inv[index] for index in kept]
        collection.ids = {point_id: index for index, point_id in enumerate(collection.ids_inv)}
        self._show(len(kept))
        self._on_compaction()
