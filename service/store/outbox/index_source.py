"""Reads what the search index is made of, for the indexer, and the state of its rebuilding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from service.store.db.database import Database
from service.store.db.hot_pool import Statement
from service.store.tables import DocumentStatus, OutboxKind

MAX_TEXT_CHARS = 8192
"""Characters of a text that are embedded; what lies beyond does not count in a search."""


class Range(NamedTuple):
    """Some items of an entity."""

    user_id: str
    entity_id: str
    since: int
    through: int


def split_ranges(ranges: Iterable[Range], size: int) -> Iterator[list[Range]]:
    """Cut ranges into parts of `size` places, so that a page reads no more than it is about."""
    page: list[Range] = []
    room = size
    for whole in ranges:
        since = whole.since
        while since <= whole.through:
            part = whole._replace(since=since, through=min(whole.through, since + room - 1))
            page.append(part)
            room -= part.through - since + 1
            since = part.through + 1
            if not room:
                yield page
                page, room = [], size
    if page:
        yield page


class Item(NamedTuple):
    """One item: of which range (its place in the list), its place in the entity, its key, and what is embedded.

    `text` is None when there is nothing to find; `vector` is what the client gave.
    """

    range_index: int
    position: int
    key: str
    text: str | None
    vector: bytes | None

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to find."""
        return not (self.text and self.text.strip())


_ASKED = "unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[]) WITH ORDINALITY AS w (user_id, entity_id, since, through, n)"

_CHUNKS = Statement.from_text(f"""
SELECT w.n - 1, c.chunk_index, c.chunk_index::text, left(c.text, {MAX_TEXT_CHARS}), c.vector
FROM {_ASKED}
JOIN document_chunks AS c
  ON c.user_id = w.user_id AND c.document_id = w.entity_id AND c.chunk_index BETWEEN w.since AND w.through
ORDER BY w.n, c.chunk_index
""")  # noqa: S608 - nothing but text of ours goes in

_MESSAGES = Statement.from_text(f"""
SELECT w.n - 1, m.seq, m.id::text, CASE WHEN m.deleted_at IS NULL THEN left(m.content, {MAX_TEXT_CHARS}) END, NULL
FROM {_ASKED}
JOIN chat_messages AS m
  ON m.user_id = w.user_id AND m.session_id = w.entity_id AND m.seq BETWEEN w.since AND w.through
ORDER BY w.n, m.seq
""")  # noqa: S608

_THERE = {
    OutboxKind.DOCUMENT: Statement.from_text("""
SELECT w.n - 1, d.chunk_count FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS w (user_id, id, n)
JOIN documents AS d ON d.user_id = w.user_id AND d.id = w.id
"""),
    OutboxKind.SESSION: Statement.from_text("""
SELECT w.n - 1, s.last_seq FROM unnest($1::uuid[], $2::uuid[]) WITH ORDINALITY AS w (user_id, id, n)
JOIN chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.id
"""),
}

_ITEMS = {OutboxKind.DOCUMENT: _CHUNKS, OutboxKind.SESSION: _MESSAGES}


async def read_item_counts(
    database: Database, kind: OutboxKind, entities: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """Return which of these documents or sessions (user id, id) are there, and how many chunks or messages each has had."""
    rows = await database.fetch_once(
        _THERE[kind], [user for user, _ in entities], [entity for _, entity in entities]
    )
    return {entities[row[0]]: row[1] for row in rows}


async def read_items(database: Database, kind: OutboxKind, ranges: Sequence[Range]) -> list[Item]:
    """Read the items of these ranges in order."""
    columns = zip(*ranges, strict=True)
    return [Item(*row) for row in await database.fetch_once(_ITEMS[kind], *map(list, columns))]


_SET_DOCUMENT_STATUS = Statement.from_text("""
UPDATE documents AS d SET status = $4, status_detail = $5
FROM unnest($1::uuid[], $2::uuid[], $3::integer[]) AS w (user_id, id, chunk_count)
WHERE d.user_id = w.user_id AND d.id = w.id AND d.chunk_count = w.chunk_count
""")


async def set_document_status(
    database: Database,
    documents: dict[tuple[str, str], int],
    status: DocumentStatus,
    detail: str = "",
) -> None:
    """Say whether documents (user id, id) can be found, but for those that have another number of chunks by now."""
    users, ids = [user for user, _ in documents], [document for _, document in documents]
    await database.fetch_once(
        _SET_DOCUMENT_STATUS, users, ids, list(documents.values()), int(status), detail
    )
