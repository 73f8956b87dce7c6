"""The types of search: points, queries, errors, and the `VectorIndex` interface.

Imports neither Qdrant nor the embeddings. Points carry ids only, no text: hits are read again from
PostgreSQL under the caller's id.
"""

from __future__ import annotations

import array
import re
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

from service.store.history_mark import Mark

FLOAT_BYTES = 4
_NAMESPACE = uuid.UUID("5d2bd0a5-5d04-5c1e-9d4e-4f0a3a3f2b11")
"""Namespace of the points' ids. Changing it orphans all points that are stored."""


class PointKind(StrEnum):
    """The kind of item that a point represents."""

    CHUNK = "chunk"
    MESSAGE = "message"


class Point(NamedTuple):
    """A chunk (by its index) of a document, or a message (by its id) of a session.

    The field names are the payload's keys in Qdrant.
    """

    user_id: str
    kind: str
    entity_id: str
    item: str

    @property
    def id(self) -> str:
        """The point's id in the index, derived from all fields.

        Document and message ids are unique for one user only.
        """
        return str(uuid.uuid5(_NAMESPACE, "/".join(self)))


MARK_POINT = Point("", "mark", "", "")
"""The point that holds an index's mark: how far the history in PostgreSQL had come.

No search and no delete selects it, since they name a user.
"""


class PointFilter(NamedTuple):
    """Selects all points of a user, or of one of the user's documents or sessions."""

    user_id: str
    kind: str | None = None
    entity_id: str | None = None


class Changes(NamedTuple):
    """Changes to an index, in the order in which they are applied."""

    delete_filters: Sequence[PointFilter] = ()
    deletes: Sequence[Point] = ()
    upserts: Sequence[Point] = ()
    vectors: bytes = b""
    """The vectors of `upserts`, concatenated: 32-bit floats, little-endian."""
    mark: Mark | None = None
    """A mark of the database from a time after these changes were read; stored before them."""

    def upserts_only(self, kept: Sequence[int]) -> Changes:
        """Return the upserts with these indexes, and the mark, without the deletes."""
        if len(kept) == len(self.upserts):
            return self._replace(delete_filters=(), deletes=())
        size = len(self.vectors) // len(self.upserts)
        vectors = b"".join(self.vectors[n * size : (n + 1) * size] for n in kept)
        upserts = [self.upserts[n] for n in kept]
        return Changes(upserts=upserts, vectors=vectors, mark=self.mark)


class VectorQuery(NamedTuple):
    """The conditions of a nearest-neighbour search, which returns only points that meet them."""

    kind: str
    owner_ids: Sequence[str]
    entity_ids: Sequence[str]
    """Documents or sessions to search. Empty for all."""
    limit: int


class ScoredPoint(NamedTuple):
    """A point with its cosine similarity to the query."""

    point: Point
    score: float


class SearchUnavailable(Exception):
    """The index or the embeddings do not respond.

    The input is not at fault, so a retry may succeed.
    """


class SearchOverloaded(SearchUnavailable):
    """The index or the embeddings respond, but accept no more requests at the moment."""


class InputRejected(Exception):
    """The index or the embeddings reject the input, and would reject it again.

    The message states the reason without quoting the input.
    """

    is_final: ClassVar[bool] = False
    """Whether indexing must not try the input again soon."""


class TextBlocked(InputRejected):
    """The search process died each time that it computed this text."""

    is_final = True


class IndexFull(InputRejected):
    """The index has applied a write, except for new points for which it has no room."""

    is_final = True
    REASON: ClassVar[str] = (
        "the embedded search index is full: set QDRANT_URL to use a Qdrant server, "
        "or raise CHAT_HISTORY_INDEX_MAX_POINTS"
    )

    def __init__(self, refused: Sequence[Point]) -> None:
        super().__init__(self.REASON)
        self.refused = refused


class SearchMisconfigured(Exception):
    """Configuration, index and installed packages do not match; the message says what to do."""


class VectorIndex(Protocol):
    """The operations that search needs from an index, in this process or another.

    Raises:
        SearchUnavailable: the index does not respond.
        InputRejected: the index rejects its input.
    """

    max_points: int | None
    """Points for which the index has room; None for no limit."""
    is_full: bool
    """Whether the latest write found no room for a new point."""

    async def open(self) -> bool:
        """Check the collection behind the alias; return False if there is none.

        Raises:
            SearchMisconfigured: its vectors have another dimension than the model's.
        """

    async def create_collection(self, mark: Mark | None = None) -> str:
        """Create an empty collection, with a mark, and return its name.

        The first collection is published immediately; a later one is separate from the live one.
        """

    async def live_collection(self) -> str | None:
        """Return the name of the collection behind the alias, if any."""

    async def has_collection(self, collection: str) -> bool:
        """Return whether a collection exists."""

    async def read_mark(self, collection: str | None = None) -> Mark | None:
        """Return the mark of a collection; None if it was written by a build without marks.

        Args:
            collection: Its name; None for the live one.
        """

    async def publish(self, collection: str) -> None:
        """Point the alias at a collection and drop the alias's other collections."""

    async def write(self, changes: Changes, building: str | None) -> None:
        """Apply changes to the live collection, and to the one that a rebuild is filling.

        During a rebuild only the collection that is filled gets the mark.

        Raises:
            IndexFull: there was no room for new points; everything else is applied.
        """

    async def search(self, vector: bytes, query: VectorQuery) -> list[ScoredPoint]:
        """Return the points nearest to a vector, nearest first."""

    async def count(self, point_filter: PointFilter) -> int:
        """Count the points that a filter selects."""

    async def close(self) -> None:
        """Close the connection to the index."""


@dataclass(slots=True)
class IndexingStats:
    """The indexer's figures for the metrics, as of its last read of the outbox."""

    pending: int = 0
    """Outbox rows that are not indexed yet."""
    failed: int = 0
    """Outbox rows in the dead letter state."""
    indexed: int = 0
    """Points written since the start of the process."""
    oldest_pending_at: float | None = None
    """Monotonic time of the oldest change that is not indexed."""
    is_full: bool = False
    """Whether the index has no room for new points."""

    @property
    def lag_s(self) -> float:
        """Seconds since the oldest pending change; they grow while the index does not respond."""
        if self.oldest_pending_at is None:
            return 0.0
        return max(0.0, time.monotonic() - self.oldest_pending_at)


class QueryStats(NamedTuple):
    """The figures of queries and of the search process for the metrics."""

    waiting: int = 0
    """Queries that wait for their turn."""
    rejected: int = 0
    """Queries that were rejected since the start, because too many waited."""
    process_restarts: int = 0
    """Times that the search process was started again."""


def alias_name(prefix: str, model: str, dimensions: int) -> str:
    """Return the alias of an index, which names the model and the dimension of its vectors."""
    slug = re.sub(r"[^a-z0-9.-]+", "-", model.lower()).strip("-.")
    return f"{prefix}_{slug}_{dimensions}"


def pack_vector(numbers: Iterable[float]) -> bytes:
    """Encode numbers as 32-bit floats, little-endian."""
    packed = array.array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_vector(vector: bytes) -> list[float]:
    """Decode the result of `pack_vector`."""
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
