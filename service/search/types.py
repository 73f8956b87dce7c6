"""What an index is, and a point of it; imports none of what it is made of. Points carry ids only, no text: what is found is read again from PostgreSQL under the caller's id."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

_NAMESPACE = uuid.UUID("5d2bd0a5-5d04-5c1e-9d4e-4f0a3a3f2b11")


class PointKind(StrEnum):
    """What a point stands for."""

    CHUNK = "chunk"
    MESSAGE = "message"


class Point(NamedTuple):
    """A chunk (by its index) of a document, or a message (by its id) of a session."""

    user_id: str
    kind: str
    entity_id: str
    item: str

    @property
    def id(self) -> str:
        """Its id in the index: ids are unique for one user only, so all of the key goes in."""
        return str(uuid.uuid5(_NAMESPACE, "/".join(self)))


class PointFilter(NamedTuple):
    """Points that must go: all of a user, or of one entity of theirs."""

    user_id: str
    kind: str | None = None
    entity_id: str | None = None


class Changes(NamedTuple):
    """What to do to an index, in this order: wipe, delete, write. `vectors` are 32-bit floats, little-endian, one after the other."""

    wipes: Sequence[PointFilter] = ()
    deletes: Sequence[Point] = ()
    points: Sequence[Point] = ()
    vectors: bytes = b""


class VectorQuery(NamedTuple):
    """What a search asks an index: the nearest points of a kind, of these owners, in these entities (empty: all)."""

    kind: str
    owners: Sequence[str]
    entities: Sequence[str]
    limit: int


class ScoredPoint(NamedTuple):
    """A point, and how near it is."""

    point: Point
    score: float


class SearchUnavailable(Exception):
    """The index or the embeddings do not answer: nothing is wrong with what they were asked, and a later try may succeed."""


class SearchOverloaded(SearchUnavailable):
    """They answer, and take no more at this moment."""


class InputRejected(Exception):
    """What was asked is refused, and would be again: the text says why, without what was asked."""


class SearchMisconfigured(Exception):
    """The index that is there does not fit the configuration; the text says what to do."""


class VectorIndex(Protocol):
    """What search needs of an index, wherever it runs.

    Raises:
        SearchDown: it does not answer.
        Refused: it does not take what it was given.
    """

    async def open(self) -> bool:
        """See what is behind the alias; False when there is nothing yet.

        Raises:
            WrongIndex: what is there does not fit the dimension.
        """

    async def create_collection(self) -> str:
        """Make a collection, beside the live one or as the first, and return its name."""

    async def live_collection(self) -> str | None:
        """Return the collection behind the alias, if any."""

    async def publish(self, collection: str) -> None:
        """Put a collection behind the alias and remove the others of this alias."""

    async def write(self, changes: Changes, building: str | None) -> None:
        """Change the live collection, and the one that is being built."""

    async def search(self, vector: bytes, question: VectorQuery) -> list[ScoredPoint]:
        """Find the nearest points."""

    async def count(self, wipe: PointFilter) -> int:
        """Count the points of a user, or of an entity of theirs."""

    async def close(self) -> None:
        """Let go of everything."""


@dataclass(slots=True)
class IndexingStats:
    """What an operator sees."""

    pending: int = 0
    failed: int = 0
    indexed: int = 0
    """Points written since the start."""
    oldest_pending_at: float | None = None
    """When the oldest change came that is not indexed, on the monotonic clock."""

    @property
    def lag_s(self) -> float:
        """Seconds since then; it goes on growing while the index does not answer."""
        return (
            0.0
            if self.oldest_pending_at is None
            else max(0.0, time.monotonic() - self.oldest_pending_at)
        )


def alias_name(prefix: str, model: str, dimensions: int) -> str:
    """Return the alias of an index: its name says what its vectors are."""
    plain = re.sub(r"[^a-z0-9.-]+", "-", model.lower()).strip("-.")
    return f"{prefix}_{plain}_{dimensions}"
