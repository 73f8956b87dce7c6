"""Replaces parts of qdrant-client's local mode that are too slow for a service.

Local mode commits each point in a transaction of its own. It also evaluates a filter in Python for
every point of a collection, through a tree of models: 15 to 40 µs a point, at every search and
every delete by a filter. This module replaces both inside the collections, which reaches into
private attributes of the package. `packages.py` therefore pins the version, and `check_package`
tests the replaced parts before an index is opened. Only the search process imports this module.
"""

from __future__ import annotations

import inspect
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.local.local_collection import LocalCollection

from service.search import packages
from service.search.types import Point, PointFilter, PointKind, SearchMisconfigured
from service.search.worker import qdrant_memory

_MASK_PARAMETERS = ["self", "payload_filter", "vector_name"]
_FIELDS = tuple(PointFilter._fields)
"""The fields of a payload that filters have."""


def check_package(data_dir: Path) -> None:
    """Check that the installed qdrant-client has the internals that this module replaces.

    Args:
        data_dir: Folder for a temporary collection: a container may have no other writable one.

    Raises:
        SearchMisconfigured: the version was not tested, or an internal is missing or differs.
    """
    if problem := packages.find_version_problem():
        raise SearchMisconfigured(problem)
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        signature = inspect.signature(LocalCollection._payload_and_non_deleted_mask)  # noqa: SLF001
        if list(signature.parameters) != _MASK_PARAMETERS:
            raise _changed(f"LocalCollection._payload_and_non_deleted_mask{signature}")
        for name, (function, parameters) in qdrant_memory.REPLACED.items():
            if list((signature := inspect.signature(function)).parameters) != parameters:
                raise _changed(f"{name}{signature}")
        _ = _collections(AsyncQdrantClient(location=":memory:"))
        with tempfile.TemporaryDirectory(prefix="qdrant-check-", dir=data_dir) as folder:
            _check_collection(folder)
    except (AttributeError, TypeError, LookupError) as error:
        raise _changed(str(error)) from error


def _check_collection(folder: str) -> None:
    """Check that a patched collection defers its commits, and adds and filters its points."""
    config = models.CreateCollection(
        vectors=models.VectorParams(size=1, distance=models.Distance.COSINE)
    )
    collection: Any = LocalCollection(config, folder)
    try:
        _patch(collection)
        points = [Point(user_id, PointKind.CHUNK, "entity", "0") for user_id in ("a", "b")]
        collection.upsert(
            [
                models.PointStruct(id=point.id, vector=[1.0], payload=point._asdict())
                for point in points
            ]
        )
        if not collection.storage.storage.in_transaction:
            raise _changed("CollectionPersistence commits through another attribute")
        condition = models.FieldCondition(key="user_id", match=models.MatchAny(any=["b"]))
        mask = collection._payload_and_non_deleted_mask(models.Filter(must=[condition]), "")  # noqa: SLF001
        if list(mask) != [False, True]:
            raise _changed("LocalCollection filters points in another way")
        if collection.deleted.dtype != bool:
            raise _changed("LocalCollection adds points in another way")
    finally:
        collection.close()


def patch_collections(
    client: AsyncQdrantClient, max_points: int = qdrant_memory.MAX_POINTS
) -> None:
    """Patch a client's collections, except those that are patched already.

    Args:
        client: The client.
        max_points: Points for which each collection has room.

    Raises:
        SearchMisconfigured: a collection does not have the internals to replace.
    """
    try:
        for collection in _collections(client):
            _patch(collection, max_points)
    except (AttributeError, TypeError, LookupError) as error:
        raise _changed(str(error)) from error


def commit(client: AsyncQdrantClient, *, purge_deleted: bool) -> None:
    """Commit the writes since the last commit, with one transaction and flush per collection.

    Args:
        purge_deleted: Whether to truncate the write-ahead log as well, so that deleted data is
            no longer in any file when this returns.
    """
    for collection in _collections(client):
        connection: _DeferredCommits = collection.storage.storage
        connection.commit()
        if purge_deleted:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def find_room(
    client: AsyncQdrantClient, names: Iterable[str | None], ids: Sequence[str], *, was_full: bool
) -> tuple[set[str], bool]:
    """Find out for which points some collections have room.

    Args:
        client: The client.
        names: The collections; None and names of others are ignored.
        ids: Points to be written to each of them.
        was_full: Whether there was no room before. It ends only when a part of the room is free, so
            that the state does not change with every delete.

    Returns:
        The ids for which there is no room, and whether there is no room now.
    """
    local: Any = client._client  # noqa: SLF001
    adders: list[qdrant_memory.AddPoint] = [
        local.collections[name]._add_point  # noqa: SLF001
        for name in names
        if name in local.collections
    ]
    refused = {point_id for adder in adders for point_id in adder.find_room(ids)}
    is_full = bool(refused) or (
        was_full and any(adder.free_count < adder.min_free_count for adder in adders)
    )
    return refused, is_full


def _patch(collection: Any, max_points: int = qdrant_memory.MAX_POINTS) -> None:
    connection = collection.storage.storage
    if not isinstance(connection, _DeferredCommits):
        if not isinstance(connection, sqlite3.Connection):
            raise _changed(f"a collection's storage is a {type(connection).__name__}")
        collection.storage.storage = _DeferredCommits(connection)
    if not isinstance(collection._payload_and_non_deleted_mask, _PayloadMask):  # noqa: SLF001
        mask = collection._payload_and_non_deleted_mask = _PayloadMask(collection)  # noqa: SLF001
        collection._add_point = qdrant_memory.AddPoint(  # noqa: SLF001
            collection, max_points, mask.reset
        )


def _collections(client: AsyncQdrantClient) -> list[Any]:
    local: Any = client._client  # noqa: SLF001
    return list(local.collections.values())


def _changed(detail: str) -> SearchMisconfigured:
    return SearchMisconfigured(
        f"the embedded search index does not work with this build of qdrant-client ({detail}): "
        f"pip install --force-reinstall 'qdrant-client~={packages.QDRANT_CLIENT}.0', "
        "or set QDRANT_URL to use a Qdrant server"
    )


class _DeferredCommits:
    """A collection's SQLite connection that commits only when `commit` is called."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Overwrites deleted data with zeros. By default SQLite only marks its pages as free.
        connection.execute("PRAGMA secure_delete = ON")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __enter__(self) -> Self:
        # The package commits by `with connection:`, at every point.
        return self

    def __exit__(self, *_error: object) -> None:
        pass


class _PayloadMask:
    """Evaluates a filter on a collection's points with one integer column per payload field.

    A column stays valid because these fields of a point never change: its id is derived from them.
    """

    def __init__(self, collection: Any) -> None:
        self._collection = collection
        self._original = collection._payload_and_non_deleted_mask  # noqa: SLF001
        self.reset()

    def reset(self) -> None:
        """Read all payloads again: points have changed their places."""
        self._count = 0
        self._codes: dict[str, dict[Any, int]] = {field: {} for field in _FIELDS}
        self._columns = {field: np.empty(0, dtype=np.int32) for field in _FIELDS}

    def __call__(self, payload_filter: models.Filter | None, vector_name: str | None = None) -> Any:
        """Return a boolean array: which points exist and match the filter."""
        conditions = _match_any_conditions(payload_filter)
        if conditions is None:
            return self._original(payload_filter, vector_name)
        self._add_new_points()
        mask = self._collection.deleted == 0
        if vector_name is not None:
            mask = mask & (self._collection.deleted_per_vector[vector_name] == 0)
        for field, values in conditions:
            codes = [
                code for value in values if (code := self._codes[field].get(value)) is not None
            ]
            mask = mask & np.isin(self._columns[field][: self._count], codes)
        return mask

    def _add_new_points(self) -> None:
        payloads = self._collection.payload[self._count :]
        if not payloads:
            return
        count = self._count + len(payloads)
        for field, codes in self._codes.items():
            if len(self._columns[field]) < count:
                # Doubling keeps the cost of copying constant per point, also for single points.
                self._columns[field] = np.resize(self._columns[field], 2 * count)
            self._columns[field][self._count : count] = [
                codes.setdefault(payload.get(field), len(codes)) for payload in payloads
            ]
        self._count = count


def _match_any_conditions(
    payload_filter: models.Filter | None,
) -> list[tuple[str, Sequence[Any]]] | None:
    """Return the fields and values of a filter as `QdrantIndex` builds it; None for any other."""
    if (
        payload_filter is None
        or payload_filter.model_fields_set != {"must"}
        or not isinstance(payload_filter.must, list)
    ):
        return None
    conditions: list[tuple[str, Sequence[Any]]] = []
    for condition in payload_filter.must:
        if (
            not isinstance(condition, models.FieldCondition)
            or not isinstance(condition.match, models.MatchAny)
            or condition.model_fields_set != {"key", "match"}
            or condition.key not in _FIELDS
        ):
            return None
        conditions.append((condition.key, condition.match.any))
    return conditions
