"""Builds the changes of an index from the items of documents and sessions: embeds their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from service.search.embeddings import Embeddings
from service.search.types import (
    FLOAT_BYTES,
    Changes,
    InputRejected,
    Point,
    PointKind,
    SearchUnavailable,
)
from service.store.outbox.index_source import EntityKey, Item, Range


class Rejection(NamedTuple):
    """Takes the place of a vector for an item that has none."""

    reason: str
    is_final: bool = False
    """Whether the item must not be tried again soon."""

    @classmethod
    def of(cls, error: InputRejected) -> Rejection:
        """Return the rejection that an error means."""
        return cls(str(error), error.is_final)


class ChangeBuilder:
    """Turns items into upserts of their vectors, or into deletes."""

    def __init__(self, embeddings: Embeddings, dimensions: int) -> None:
        self._embeddings = embeddings
        self._dimensions = dimensions

    async def build(
        self, kind: PointKind, ranges: Sequence[Range], items: Sequence[Item]
    ) -> tuple[Changes, dict[EntityKey, Rejection]]:
        """Return the changes that make the index match the items.

        Items without text and rejected items become deletes, so that search no longer finds an
        earlier version of them.

        Args:
            kind: Kind of all items.
            ranges: The ranges that were read.
            items: The items of these ranges, as PostgreSQL holds them now.

        Returns:
            The changes, and the entities of which an item was rejected.

        Raises:
            SearchUnavailable: the embeddings do not respond.
        """
        texts = [item.text or "" for item in items if item.vector is None and not item.is_blank]
        embedded = iter(await self._embed(texts))
        deletes: list[Point] = []
        upserts: list[Point] = []
        vectors: list[bytes] = []
        rejections: dict[EntityKey, Rejection] = {}
        for item in items:
            source = ranges[item.range_index]
            point = Point(source.user_id, kind, source.entity_id, item.key)
            if item.is_blank:
                deletes.append(point)
                continue
            vector = next(embedded) if item.vector is None else self._check(item.vector)
            if isinstance(vector, Rejection):
                entity = source.user_id, source.entity_id
                if vector.is_final or entity not in rejections:
                    rejections[entity] = vector
                deletes.append(point)
            else:
                upserts.append(point)
                vectors.append(vector)
        return Changes((), deletes, upserts, b"".join(vectors)), rejections

    def _check(self, vector: bytes) -> bytes | Rejection:
        """Return a client's vector if it has the index's dimension."""
        if len(vector) == self._dimensions * FLOAT_BYTES:
            return vector
        return Rejection(
            f"the given vectors have dimension {len(vector) // FLOAT_BYTES}, "
            f"and the index has {self._dimensions}"
        )

    async def _embed(self, texts: Sequence[str]) -> list[bytes | Rejection]:
        """Return the vector or the rejection of each text.

        The model rejects a batch as a whole. Halving the batch isolates the text at fault.
        """
        if not texts:
            return []
        try:
            vectors = await self._embeddings.embed(texts)
        except InputRejected as error:
            if len(texts) == 1:
                return [Rejection.of(error)]
            half = len(texts) // 2
            return await self._embed(texts[:half]) + await self._embed(texts[half:])
        vector_bytes = self._dimensions * FLOAT_BYTES
        if len(vectors) != vector_bytes * len(texts):
            raise SearchUnavailable("the embeddings have another dimension than the index")
        return [
            vectors[start : start + vector_bytes] for start in range(0, len(vectors), vector_bytes)
        ]
