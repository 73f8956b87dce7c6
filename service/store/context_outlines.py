"""Reads of GetContext: the messages of a prompt, and their outlines.

An outline is a message without its texts. It has what the rules of a prompt need: the seq, the
role, the size, the tokens, and of the parts the ids of tool calls and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.read_batching import Parameters
from service.store.message_pages import (
    MAX_SEQ,
    large_read,
    read_in_steps,
    scan_range,
    select_bounded,
)
from service.store.rows import MESSAGE_COLUMNS, MessageRow
from service.store.tables import Role, chat_messages, chat_sessions

_session, _message = chat_sessions.c, chat_messages.c


def select_newest(parameters: Parameters, **bounds: Any) -> sa.Select[Any]:
    """Select the messages before `seq` that no summary covers (rule 5), newest first.

    Args:
        parameters: The parameters.
        bounds: Arguments of `select_bounded`.
    """
    covered_seq = (
        sa.select(
            sa.case(
                (_session.summary != sa.literal_column("''"), _session.summarized_through_seq),
                else_=sa.literal_column("0"),
            )
        )
        .where(_session.user_id == parameters["user_id"], _session.id == parameters["session_id"])
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    return select_bounded(parameters, _message.seq > covered_seq, descending=True, **bounds)


def select_leading_system(
    parameters: Parameters,
    after_seq: sa.ColumnElement[int],
    *,
    max_scanned: int,
    **bounds: Any,
) -> sa.Select[Any]:
    """Select the SYSTEM messages after a seq that precede the first message of another role.

    Args:
        parameters: The parameters.
        after_seq: The seq.
        max_scanned: Number of rows in which the message of another role is looked for, too.
        bounds: Further arguments of `select_bounded`.
    """
    scanned = (
        sa.select(_message.seq, _message.role, _message.deleted_at)
        .where(
            _message.user_id == parameters["user_id"],
            _message.session_id == parameters["session_id"],
            *scan_range(parameters, after_seq, sa.literal_column(str(max_scanned))),
        )
        .order_by(_message.seq)
        .correlate(*parameters.tables)
        .subquery("scanned")
    )
    first_other_seq = (
        sa.select(scanned.c.seq)
        .where(
            scanned.c.deleted_at.is_(None),
            scanned.c.role != sa.literal_column(f"{Role.SYSTEM:d}"),
        )
        .limit(sa.literal_column("1"))
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    is_leading = _message.seq < sa.func.coalesce(first_other_seq, sa.literal_column(str(MAX_SEQ)))
    return select_bounded(
        parameters, is_leading, start=after_seq, max_scanned=max_scanned, **bounds
    )


# Parts with the tool calls and results only. The ids are replaced by hashes, since an id may have
# 256 characters, a message 64 of them, and a look-back two thousand messages.
_TOOL_PARTS = """(
    SELECT jsonb_agg(
        CASE WHEN part -> 'tool_call' IS NOT NULL
        THEN jsonb_build_object('tool_call', jsonb_build_object(
            'id', hashtextextended(part #>> '{tool_call,id}', 0)))
        ELSE jsonb_build_object('tool_result', jsonb_build_object(
            'tool_call_id', hashtextextended(part #>> '{tool_result,tool_call_id}', 0)))
        END)::text
    FROM jsonb_array_elements(m.parts) AS part
    WHERE part -> 'tool_call' IS NOT NULL OR part -> 'tool_result' IS NOT NULL
)"""


def _outline_columns(rows: sa.FromClause) -> tuple[sa.ColumnElement[Any], ...]:
    """Return the columns of a MessageRow without texts, from the subquery `m`."""
    empty: sa.ColumnElement[str] = sa.literal_column("''")
    return (
        empty,
        rows.c.seq,
        rows.c.role,
        empty,
        sa.literal_column(_TOOL_PARTS),
        sa.null(),
        rows.c.token_count,
        rows.c.token_estimate,
        rows.c.size,
        empty,
        sa.null(),
        sa.null(),
        *[sa.literal_column("0")] * 3,
    )


def _select_leading_system_after(parameters: Parameters, **bounds: Any) -> sa.Select[Any]:
    return select_leading_system(parameters, parameters["seq"], **bounds)


_LEADING_SYSTEM = large_read(_select_leading_system_after, columns=_outline_columns)
_NEWEST = large_read(select_newest, columns=_outline_columns)


async def read_leading_system(
    connection: AsyncConnection, ids: dict[str, str], limit: int, max_bytes: int
) -> list[MessageRow]:
    """Read the outlines of a session's leading SYSTEM messages.

    Args:
        connection: The connection, in a transaction.
        ids: `user_id` and `session_id`.
        limit: Maximum number of messages.
        max_bytes: Maximum bytes of the messages.
    """
    page = await read_in_steps(connection, _LEADING_SYSTEM, ids, 0, limit, max_bytes)
    return page.rows


async def read_before(
    connection: AsyncConnection, ids: dict[str, str], seq: int, limit: int, max_bytes: int
) -> list[MessageRow]:
    """Read the outlines of the messages before `seq` that no summary covers, newest first.

    Args:
        connection: The connection, in a transaction.
        ids: `user_id` and `session_id`.
        seq: The seq.
        limit: Maximum number of messages.
        max_bytes: Maximum bytes of the messages.
    """
    page = await read_in_steps(connection, _NEWEST, ids, seq, limit, max_bytes, descending=True)
    return page.rows


async def read_messages(
    connection: AsyncConnection, ids: dict[str, str], seqs: Sequence[int]
) -> list[MessageRow]:
    """Read the messages with these seqs, except those deleted since, in order of seq."""
    query = (
        sa.select(*MESSAGE_COLUMNS)
        .where(
            _message.user_id == ids["user_id"],
            _message.session_id == ids["session_id"],
            _message.seq == sa.any_(sa.literal(seqs, sa.ARRAY(_message.seq.type))),
            _message.deleted_at.is_(None),
        )
        .order_by(_message.seq)
    )
    return [MessageRow._make(row) for row in await connection.execute(query)]
