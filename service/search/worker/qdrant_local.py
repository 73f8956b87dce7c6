"""What makes qdrant-client's embedded mode fit to serve; only the child process imports it.

The mode commits every point by itself and tests every point of a collection in Python, by a tree of models: 15 to 40 µs each, at every
search and every delete by a filter. Both are replaced inside its collections; should the package change there, they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from qdrant_client import models

from service.search.types import Point


def fit(client: Any) -> None:
    """Fit a client's collections, those that were made since the last time too."""
    for collection in _collections(client):
        connection: Any = getattr(collection, "storage", None)
        if hasattr(connection, "storage") and not isinstance(connection.storage, _Gathered):
            connection.storage = _Gathered(connection.storage)
        if hasattr(collection, "_payload_and_non_deleted_mask") and not isinstance(
            collection._payload_and_non_deleted_mask,  # noqa: SLF001
            _Masks,
        ):
            collection._payload_and_non_deleted_mask = _Masks(collection)  # noqa: SLF001


def commit(client: Any, *, erased: bool) -> None:
    """Commit what was written since the last time, in one transaction and one flush to the disk.

    With `erased`, what was erased is gone from the files too when this returns.
    """
    for collection in _collections(client):
        if isinstance(connection := getattr(collection.storage, "storage", None), _Gathered):
            connection.commit()
            if erased:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _collections(client: Any) -> list[Any]:
    return list(getattr(getattr(client, "_client", None), "collections", {}).values())


class _Gathered:
    """A collection's SQLite connection that commits when it is told to."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # What is erased is overwritten, not only forgotten.
        connection.execute("PRAGMA secure_delete = ON")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


class _Masks:
    """Says which points of a collection a filter means, by one column of numbers a field.

    A point's payload never changes: its id is made of all of it.
    """

    def __init__(self, collection: Any) -> None:
        self._collection = collection
        self._slow = collection._payload_and_non_deleted_mask  # noqa: SLF001
        self._known = 0
        self._numbers: dict[str, dict[Any, int]] = {field: {} for field in Point._fields}
        self._columns = {field: np.empty(0, dtype=np.int32) for field in Point._fields}

    def __call__(self, payload_filter: models.Filter | None, vector_name: str | None = None) -> Any:
        """Return an array that says of every point whether it is there and meant."""
        conditions = _conditions(payload_filter)
        if conditions is None:
            return self._slow(payload_filter, vector_name)
        self._catch_up()
        mask = self._collection.deleted == 0
        if vector_name is not None:
            mask = mask & (self._collection.deleted_per_vector[vector_name] == 0)
        for field, values in conditions:
            numbers = [n for value in values if (n := self._numbers[field].get(value)) is not None]
            mask = mask & np.isin(self._columns[field][: self._known], numbers)
        return mask

    def _catch_up(self) -> None:
        new = self._collection.payload[self._known :]
        if not new:
            return
        count = self._known + len(new)
        for field, numbers in self._numbers.items():
            if len(self._columns[field]) < count:
                # Twice as much as is needed, so that points that come one by one do not copy it every time.
                self._columns[field] = np.resize(self._columns[field], 2 * count)
            self._columns[field][self._known : count] = [
                numbers.setdefault(payload.get(field), len(numbers)) for payload in new
            ]
        self._known = count


def _conditions(payload_filter: models.Filter | None) -> list[tuple[str, Sequence[Any]]] | None:
    """Take a filter of ours apart: every field any of some values; None for another's."""
    if (
        payload_filter is None
        or payload_filter.model_fields_set != {"must"}
        or not isinstance(payload_filter.must, list)
    ):
        return None
    found: list[tuple[str, Sequence[Any]]] = []
    for each in payload_filter.must:
        if (
            not isinstance(each, models.FieldCondition)
            or not isinstance(each.match, models.MatchAny)
            or each.model_fields_set != {"key", "match"}
            or each.key not in Point._fields
        ):
            return None
        found.append((each.key, each.match.any))
    return found
