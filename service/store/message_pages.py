"""Pages of messages within bounds of rows and bytes. The pages of watches are in `watch_pages`.

A hot statement returns at most HOT_READ_BYTES of messages, and scans a bounded number of
tombstones. Expensive work reads the rest of the page (`bounded_reads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import sessions
from service.store.bounded_reads import (
    HOT_READ_BYTES,
    Budget,
    Page,
    read_large,
)
from service.store.db.read_batching import BatchedRead, Parameters, Rows, Types
from service.store.db.readers import BatchReader
from service.store.lag_gate import ReplicaBehind
from service.store.rows import MAX_PAGE_BYTES, MessageRow, SessionRow, message_columns
from service.store.tables import chat_messages, chat_sessions

MAX_SEQ = 2**63 - 1
"""Greater than the `seq` of any message."""
SPARE_SCANNED = 20
"""Rows that a hot statement scans, at most, beyond one and a half for each message of its limit."""
MAX_SCANNED = 10_000
"""Rows, with tombstones, that a statement of expensive work scans at most."""

_session, _message = chat_sessions.c, chat_messages.c

PAGE_PARAMETERS = {
    "user_id": _message.user_id.type,
    "session_id": _message.session_id.type,
    "seq": sa.BigInteger(),
    "limit": sa.Integer(),
}
"""The parameters of a read of messages, with their types."""


def _integer(value: int) -> sa.ColumnElement[int]:
    return sa.literal_column(str(value), sa.BigInteger())


def select_bounded(
    parameters: Parameters,
    match: sa.ColumnElement[bool],
    *,
    descending: bool = False,
    start: sa.ColumnElement[int] | None = None,
    limit: sa.ColumnElement[int] | None = None,
    max_bytes: sa.ColumnElement[int] | int = HOT_READ_BYTES,
    max_scanned: int | None = None,
    columns: Callable[[sa.FromClause], Sequence[sa.ColumnElement[Any]]] = message_columns,
) -> sa.Select[Any]:
    """Select messages of one session within bounds of rows and bytes, without tombstones.

    The sizes are summed before any text is read. The first message beyond `max_bytes`, and the
    last row of a scan of `max_scanned` rows, are returned without their text: their content is NULL
    (see `split_read`).

    The scan is bounded by a range of seqs, which have no gap. Its LIMIT alone would not do: if the
    planner expects fewer rows than that, it reads and sorts the whole session.

    Args:
        parameters: Has `user_id`, `session_id` and, without `start` or `limit`, `seq` or `limit`.
        match: Further condition on the messages.
        descending: Whether the newest messages come first.
        start: The seq after which the read starts (before it if descending).
        limit: Number of rows.
        max_bytes: Bytes of the messages.
        max_scanned: Number of rows that are read from the table, with tombstones. By default it is
            one and a half of the number of rows, and SPARE_SCANNED.
        columns: Returns the columns of a MessageRow.
    """
    start = parameters["seq"] if start is None else start
    limit = parameters["limit"] if limit is None else limit
    scanned_count: sa.ColumnElement[int] = (
        limit + limit // _integer(2) + _integer(SPARE_SCANNED)
        if max_scanned is None
        else _integer(max_scanned)
    )
    if isinstance(max_bytes, int):
        max_bytes = _integer(max_bytes)
    order = _message.seq.desc() if descending else _message.seq.asc()
    scan = (
        sa.select(
            chat_messages,
            sa.func.sum(_message.size).over(order_by=order, rows=(None, 0)).label("running_bytes"),
            sa.func.count().over(order_by=order, rows=(None, 0)).label("scanned"),
        )
        .where(
            _message.user_id == parameters["user_id"],
            _message.session_id == parameters["session_id"],
            *scan_range(parameters, start, scanned_count, descending=descending),
            match,
        )
        .order_by(order)
        .limit(scanned_count)
        .correlate(*parameters.tables)
        .subquery("m")
    )
    is_read = (scan.c.running_bytes <= max_bytes) & (scan.c.scanned < scanned_count)
    is_in_page = scan.c.deleted_at.is_(None) & (scan.c.running_bytes - scan.c.size <= max_bytes)
    return (
        sa.select(
            *(
                sa.case((is_read, column)) if position in _TEXT_COLUMNS else column
                for position, column in enumerate(columns(scan))
            )
        )
        .where(is_in_page | (scan.c.scanned == scanned_count))
        .limit(limit)
        .correlate(*parameters.tables)
    )


def scan_range(
    parameters: Parameters,
    start: sa.ColumnElement[int],
    count: sa.ColumnElement[int],
    *,
    descending: bool = False,
) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """Return the conditions for the `count` messages and tombstones after a seq, or before it."""
    if not descending:
        # A client may ask for the messages after any seq: the sum must not overflow.
        last_start = _integer(MAX_SEQ - 2**32)
        return _message.seq > start, _message.seq <= sa.func.least(start, last_start) + count
    end_seq = (
        sa.select(_session.last_seq + _integer(1))
        .where(_session.user_id == parameters["user_id"], _session.id == parameters["session_id"])
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    return _message.seq < start, _message.seq >= sa.func.least(start, end_seq) - count


class Unread(NamedTuple):
    """A row that a bounded read has reached, but not read."""

    seq: int
    size: int
    """0 for a tombstone."""


_CONTENT, _SEQ, _SIZE = map(MessageRow._fields.index, ("content", "seq", "size"))
SIZE_COLUMN = _SIZE
"""Index of the size in the records of `select_bounded`."""
_TEXT_COLUMNS = frozenset(map(MessageRow._fields.index, ("content", "parts", "metadata")))


def split_read(records: Rows) -> tuple[list[MessageRow], Unread | None]:
    """Split the records of `select_bounded` into the messages and the first row not read, if any.

    None means that the read has found `limit` messages or the end of the session.
    """
    if not records or records[-1][_CONTENT] is not None:
        return [MessageRow._make(record) for record in records], None
    count = next(n for n, record in enumerate(records) if record[_CONTENT] is None)
    unread = Unread(records[count][_SEQ], records[count][_SIZE])
    return [MessageRow._make(record) for record in records[:count]], unread


def total_bytes(rows: Iterable[MessageRow]) -> int:
    """Return the bytes of messages together."""
    return sum(row.size for row in rows)


def _select_after_seq(parameters: Parameters, **bounds: Any) -> sa.Select[Any]:
    """Select the messages after `seq`, oldest first."""
    return select_bounded(parameters, sa.true(), **bounds)


def _select_before_seq(parameters: Parameters, **bounds: Any) -> sa.Select[Any]:
    """Select the messages before `seq`, newest first."""
    return select_bounded(parameters, sa.true(), descending=True, **bounds)


_AFTER_SEQ = BatchedRead(_select_after_seq, PAGE_PARAMETERS, size_column=SIZE_COLUMN)
_BEFORE_SEQ = BatchedRead(_select_before_seq, PAGE_PARAMETERS, size_column=SIZE_COLUMN)


def large_read(
    select: Callable[..., sa.Select[Any]], types: Types = PAGE_PARAMETERS, **bounds: Any
) -> sa.Select[Any]:
    """Return a bounded read as a statement of expensive work, with a parameter `max_bytes`."""
    parameters = Parameters.bound({**types, "max_bytes": sa.BigInteger()})
    return select(parameters, max_bytes=parameters["max_bytes"], max_scanned=MAX_SCANNED, **bounds)


LARGE_AFTER_SEQ = large_read(_select_after_seq)
"""Reads the messages after `seq`, oldest first."""
_LARGE_BEFORE_SEQ = large_read(_select_before_seq)


async def read_in_steps(
    connection: AsyncConnection,
    statement: sa.Select[Any],
    values: Mapping[str, Any],
    seq: int,
    limit: int,
    max_bytes: int,
    *,
    descending: bool = False,
    skips_gap: bool = False,
) -> Page[MessageRow]:
    """Read up to `limit` messages in statements that scan at most MAX_SCANNED rows each.

    Args:
        connection: The connection, in a transaction.
        statement: A `large_read`.
        values: Its parameters, except the bounds.
        seq: The seq after which the read starts (before it if descending).
        limit: Maximum number of messages.
        max_bytes: Maximum bytes of the messages.
        descending: Whether the newest messages come first.
        skips_gap: Whether to look for messages behind a gap, which a session has in front while it
            is being deleted.
    """
    page: Page[MessageRow] = Page([], 0)
    while True:
        step = {
            "seq": seq,
            "limit": limit - len(page.rows),
            "max_bytes": max_bytes - page.size_bytes,
        }
        records = (await connection.execute(statement, {**values, **step})).all()
        rows, unread = split_read(records)
        page.rows += rows
        page.size_bytes += total_bytes(rows)
        if len(page.rows) == limit:
            return page
        if unread is None:
            next_seq = await _next_seq(connection, values, seq) if skips_gap else None
            if next_seq is None:
                return page
            seq = next_seq - 1
            continue
        if page.size_bytes + unread.size > max_bytes:
            page.unread_bytes = unread.size
            return page
        # The scan has reached its bound: the next one begins with this row.
        seq = unread.seq + 1 if descending else unread.seq - 1


async def _next_seq(connection: AsyncConnection, values: Mapping[str, Any], seq: int) -> int | None:
    """Return the first seq of a session beyond a scan that has started at `seq`."""
    query = sa.select(sa.func.min(_message.seq)).where(
        _message.user_id == values["user_id"],
        _message.session_id == values["session_id"],
        _message.seq > min(seq, MAX_SEQ - MAX_SCANNED) + MAX_SCANNED,
    )
    next_seq: int | None = await connection.scalar(query)
    return next_seq


async def list_page(
    reads: BatchReader,
    user_id: str,
    session_id: str,
    cursor: int,
    limit: int,
    budget: Budget,
    *,
    descending: bool = False,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read up to `limit` messages after the seq `cursor` (before it if descending).

    Returns:
        The messages, fewer than `limit` if MAX_PAGE_BYTES are reached, and whether there are more.

    Raises:
        NotFound: this user has no such session.
        Overloaded: the page is large, and there is no room for it.
    """
    read = _BEFORE_SEQ if descending else _AFTER_SEQ
    ids = {"user_id": user_id, "session_id": session_id}
    records = await reads.fetch(read, deadline, **ids, seq=cursor, limit=limit + 1)
    rows, unread = split_read(records)
    has_gap = not descending and may_have_gap(rows, unread, cursor, limit + 1)
    # Messages cannot exist without their session, so only an empty page needs this check.
    if has_gap or not records:
        session = await reads.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=deadline,
        )
        if has_gap:
            unread = behind_gap(session, rows, cursor, limit + 1)
    if unread is None:
        return rows[:limit], len(rows) > limit
    if unread.size:
        reads.database.large_reads.add(user_id)
        if len(rows) == limit:
            return rows, True
    max_bytes = MAX_PAGE_BYTES - total_bytes(rows)
    rest = await read_large(
        reads.database,
        budget,
        max_bytes,
        lambda connection: read_in_steps(
            connection,
            _LARGE_BEFORE_SEQ if descending else LARGE_AFTER_SEQ,
            ids,
            unread.seq + 1 if descending else unread.seq - 1,
            limit + 1 - len(rows),
            max_bytes,
            descending=descending,
            skips_gap=not descending,
        ),
        owner_id=user_id,
        deadline=deadline,
    )
    rows += rest.rows
    return rows[:limit], len(rows) > limit or rest.unread_bytes is not None


async def list_older_page(
    reads: BatchReader,
    user_id: str,
    session_id: str,
    cursor: int,
    limit: int,
    budget: Budget,
    *,
    descending: bool = False,
    deadline: float,
) -> tuple[list[MessageRow], bool]:
    """Read a page behind another one from a replica, as `list_page` does from the primary.

    The pages before it may show messages that the replica lacks. Without the checks the list would
    have a gap, or end too early.

    Raises:
        ReplicaBehind: the replica may lack messages of the page.
        NotFound: it has no such session of this user.
        Overloaded: as `list_page`.
    """
    if descending:
        session = await reads.database.read(
            lambda connection: sessions.get(connection, user_id, session_id),
            owner_id=user_id,
            deadline=deadline,
        )
        if session.last_seq < cursor - 1:
            raise ReplicaBehind
    rows, has_more = await list_page(
        reads,
        user_id,
        session_id,
        cursor,
        limit,
        budget,
        descending=descending,
        deadline=deadline,
    )
    if not (descending or has_more):
        raise ReplicaBehind  # Only the primary knows the end.
    return rows, has_more


def may_have_gap(rows: Sequence[MessageRow], unread: Unread | None, seq: int, limit: int) -> bool:
    """Return whether a hot read after `seq` may have ended early because of a gap in front.

    A session has one while it is being deleted, and if that was cut off.
    """
    return unread is None and len(rows) < limit and (not rows or rows[0].seq > seq + 1)


def behind_gap(
    session: SessionRow, rows: Sequence[MessageRow], seq: int, limit: int
) -> Unread | None:
    """Return where such a read goes on; None if the session has no messages beyond its scan."""
    if session.last_seq <= seq + limit + limit // 2 + SPARE_SCANNED:
        return None
    return Unread((rows[-1].seq if rows else seq) + 1, 0)
