"""Reads the texts and vectors that the indexer indexes, and writes the status of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from service.store.db.database import Database
from service.store.db.hot_pool import Statement
from service.store.tables import DocumentStatus, OutboxKind

MAX_TEXT_CHARS = 8192
"""Characters of a text, from its beginning, that are embedded; search does not find the rest."""


class Range(NamedTuple):
    """Items of an entity: chunks of a document by index, or messages of a session by seq."""

    user_id: str
    entity_id: str
    since: int
    through: int


def split_ranges(ranges: Iterable[Range], size: int) -> Iterator[list[Range]]:
    """Split ranges into pages of at most `size` items each, so that a read stays small."""
    page: list[Range] = []
    free_count = size
    for range_ in ranges:
        since = range_.since
        while since <= range_.through:
            part = range_._replace(since=since, through=min(range_.through, since + free_count - 1))
            page.append(part)
            free_count -= part.through - since + 1
            since = part.through + 1
            if not free_count:
                yield page
                page, free_count = [], size
    if page:
        yield page


class Item(NamedTuple):
    """A chunk or a message to be indexed."""

    range_index: int
    """Index of its range in the list of ranges that were read."""
    position: int
    """Index of the chunk, or seq of the message."""
    key: str
    """Index of the chunk as text, or id of the message."""
    text: str | None
    """The text to embed; None for a deleted message."""
    vector: bytes | None
    """The client's vector, if any."""

    @property
    def is_blank(self) -> bool:
        """Whether it has no text that search could find."""
        return not (self.text and self.text.strip())


_RANGES = """unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[]) WITH ORDINALITY
     AS w (user_id, entity_id, since, through, n)"""

_CHUNKS = Statement.from_text(f"""
SELECT w.n - 1, c.chunk_index, c.chunk_index::text, left(c.text, {MAX_TEXT_CHARS}), c.vector
FROM {_RANGES}
JOIN chathistory.document_chunks AS c
  ON c.user_id = w.user_id AND c.document_id = w.entity_id
 AND c.chunk_index BETWEEN w.since AND w.through
ORDER BY w.n, c.chunk_index
""")  # noqa: S608 - only constants are inserted

_MESSAGES = Statement.from_text(f"""
SELECT w.n - 1, m.seq, m.id::text,
       CASE WHEN m.deleted_at IS NULL THEN left(m.content, {MAX_TEXT_CHARS}) END, NULL
FROM {_RANGES}
JOIN chathistory.chat_messages AS m
  ON m.user_id = w.user_id AND m.session_id = w.entity_id AND m.seq BETWEEN w.since AND w.through
ORDER BY w.n, m.seq
""")  # noqa: S608 - only constants are inserted

_ITEM_COUNTS = {
    OutboxKind.DOCUMENT: Statement.from_text("""
SELECT w.n - 1, d.chunk_count
FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS w (user_id, id, n)
JOIN chathistory.documents AS d ON d.user_id = w.user_id AND d.id = w.id
"""),
    OutboxKind.SESSION: Statement.from_text("""
SELECT w.n - 1, s.last_seq
FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS w (user_id, id, n)
JOIN chathistory.chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.id
"""),
}

_ITEMS = {OutboxKind.DOCUMENT: _CHUNKS, OutboxKind.SESSION: _MESSAGES}


EntityKey = tuple[str, str]
"""A document or session: user id, id."""

_SET_DOCUMENT_STATUS = Statement.from_text("""
UPDATE chathistory.documents AS d SET status = $4, status_detail = $5
FROM unnest($1::uuid[], $2::uuid[], $3::integer[]) AS w (user_id, id, chunk_count)
WHERE d.user_id = w.user_id AND d.id = w.id AND d.chunk_count = w.chunk_count
""")


class IndexSource:
    """The items to index; each method runs one statement, without retries.

    Raises:
        Any of `DATABASE_ERRORS`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def item_counts(
        self, kind: OutboxKind, entities: Sequence[EntityKey]
    ) -> dict[EntityKey, int]:
        """Return the chunk count of each document, or the last seq of each session, that exists."""
        records = await self._database.fetch_once(
            _ITEM_COUNTS[kind],
            [user_id for user_id, _ in entities],
            [entity_id for _, entity_id in entities],
            is_reading=True,
        )
        return {entities[record[0]]: record[1] for record in records}

    async def items(self, kind: OutboxKind, ranges: Sequence[Range]) -> list[Item]:
        """Read the items of ranges, in order."""
        columns = map(list, zip(*ranges, strict=True))
        records = await self._database.fetch_once(_ITEMS[kind], *columns, is_reading=True)
        return [Item(*record) for record in records]

    async def set_document_status(
        self, chunk_counts: dict[EntityKey, int], status: DocumentStatus, detail: str = ""
    ) -> None:
        """Set the status of documents, except of those whose chunk count has changed.

        Args:
            chunk_counts: The documents, with the chunk counts that the status is about.
            status: The status.
            detail: The reason of a failure.
        """
        await self._database.fetch_once(
            _SET_DOCUMENT_STATUS,
            [user_id for user_id, _ in chunk_counts],
            [document_id for _, document_id in chunk_counts],
            list(chunk_counts.values()),
            int(status),
            detail,
        )
