"""The pages of a watch: the messages after those that the watcher has received.

A position names the session and the last received message, each with the time of its creation. If
the stored rows have other times, they are others: the session was created again, or the database
has gone back in time and the seq was taken by another message.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import NotFound, OutOfRange
from service.store import sessions
from service.store.bounded_reads import STREAM_PAGE_BYTES, Page
from service.store.db.database import Database
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher
from service.store.db.work_class import WorkClass
from service.store.message_pages import (
    PAGE_PARAMETERS,
    Unread,
    behind_gap,
    large_read,
    may_have_gap,
    read_in_steps,
    select_bounded,
    split_read,
)
from service.store.rows import MessageRow, SessionRow, epoch_us
from service.store.tables import chat_messages, chat_sessions

_session, _message = chat_sessions.c, chat_messages.c

_PARAMETERS = PAGE_PARAMETERS | {
    "session_created_us": sa.BigInteger(),
    "seen_seq": sa.BigInteger(),
    "seen_created_us": sa.BigInteger(),
}


class WatchPosition(NamedTuple):
    """Position of a watcher in a session."""

    user_id: str
    session_id: str
    session_created_us: int
    """When the session was created: one that was created later with the same id is another one."""
    seq: int
    """The watcher has received the messages up to here."""
    seen_created_us: int
    """When the message at `seq` was created; 0 if that is not known."""

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of a read at this position, except its bounds."""
        # A read in steps advances `seq`, and `seen_seq` keeps its value.
        return {**self._asdict(), "seen_seq": self.seq}


def _select_next(parameters: Parameters, **bounds: Any) -> sa.Select[Any]:
    """Select the messages after `seq`, but only if the session and the last message are the same.

    A missing last message is no evidence: a deletion in slices begins with the oldest messages.
    """
    is_same_session = (
        sa.select(_session.id)
        .where(
            _session.user_id == parameters["user_id"],
            _session.id == parameters["session_id"],
            epoch_us(_session.created_at) == parameters["session_created_us"],
        )
        .correlate(*parameters.tables)
        .exists()
    )
    seen = chat_messages.alias("seen")
    is_other_message = (
        sa.select(seen.c.seq)
        .where(
            seen.c.user_id == parameters["user_id"],
            seen.c.session_id == parameters["session_id"],
            seen.c.seq == parameters["seen_seq"],
            epoch_us(seen.c.created_at) != parameters["seen_created_us"],
        )
        .correlate(*parameters.tables)
        .exists()
    )
    has_no_time = parameters["seen_created_us"] == sa.literal_column("0")
    is_same_history = is_same_session & (has_no_time | ~is_other_message)
    return select_bounded(parameters, is_same_history, **bounds)


def _watch_page(parameters: Parameters) -> sa.Select[Any]:
    return _select_next(parameters, max_bytes=STREAM_PAGE_BYTES)


NEXT_PAGE = BatchedRead(_watch_page, _PARAMETERS)
"""Reads the messages after a position."""
_LARGE_NEXT_PAGE = large_read(_select_next, _PARAMETERS)


async def open_position(
    connection: AsyncConnection, user_id: str, session_id: str, seq: int, seen_created_us: int
) -> WatchPosition:
    """Return the position of a watcher that has received the messages up to `seq`.

    Args:
        connection: The connection.
        user_id: Owner of the session.
        session_id: The session.
        seq: The seq of the last received message; 0 for none.
        seen_created_us: When that message was created, as the watcher knows; 0 if it does not.

    Raises:
        NotFound: this user has no such session.
        OutOfRange: the session does not hold what the watcher has received (HISTORY_RESTORED).
    """
    session = await sessions.get(connection, user_id, session_id)
    position = WatchPosition(user_id, session_id, session.created_us, seq, seen_created_us)
    stored_us = await _check_history(connection, session, position) if seq else 0
    return position._replace(seen_created_us=seen_created_us or stored_us)


async def _check_history(
    connection: AsyncConnection, session: SessionRow, position: WatchPosition
) -> int:
    """Return when the message at a position was created; 0 if it is deleted.

    Raises:
        OutOfRange: the database has gone back in time (HISTORY_RESTORED).
    """
    query = sa.select(epoch_us(_message.created_at)).where(
        _message.user_id == position.user_id,
        _message.session_id == position.session_id,
        _message.seq == position.seq,
    )
    stored_us: int = await connection.scalar(query) or 0
    is_other_message = bool(stored_us) and position.seen_created_us not in (0, stored_us)
    if session.last_seq < position.seq or is_other_message:
        raise OutOfRange.history_restored(session.id, session.last_seq)
    return stored_us


async def list_since(
    reads: ReadBatcher, position: WatchPosition, limit: int, *, deadline: float
) -> tuple[list[MessageRow], Unread | None]:
    """Read up to `limit` messages, or STREAM_PAGE_BYTES, after a position.

    Returns:
        The messages, and a row after them that was reached but not read.

    Raises:
        NotFound: the session was deleted.
        OutOfRange: the database has gone back in time (HISTORY_RESTORED).
    """
    records = await reads.fetch(NEXT_PAGE, deadline, **position.values, limit=limit)
    rows, unread = split_read(records)
    if may_have_gap(rows, unread, position.seq, limit):
        session = await reads.database.read(
            lambda connection: _get_session(connection, position),
            owner_id=position.user_id,
            deadline=deadline,
        )
        unread = behind_gap(session, rows, position.seq, limit)
    return rows, unread


async def _get_session(connection: AsyncConnection, position: WatchPosition) -> SessionRow:
    session = await sessions.get(connection, position.user_id, position.session_id)
    if session.created_us != position.session_created_us:
        raise NotFound.session(position.session_id)
    await _check_history(connection, session, position)
    return session


async def list_large_since(
    database: Database, position: WatchPosition, limit: int, max_bytes: int, deadline: float
) -> Page[MessageRow]:
    """Read as `list_since`, but by expensive work, up to `max_bytes`."""
    return await database.read(
        lambda connection: read_in_steps(
            connection,
            _LARGE_NEXT_PAGE,
            position.values,
            position.seq,
            limit,
            max_bytes,
            skips_gap=True,
        ),
        owner_id=position.user_id,
        deadline=deadline,
        work_class=WorkClass.EXPENSIVE,
    )
