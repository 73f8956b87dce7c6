"""Reads a page of a list in the two steps that `store/bounded_reads.py` describes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.rpc.call import Call
from service.store.bounded_reads import (
    FIRST_READ_ROWS,
    HOT_READ_BYTES,
    Connection,
    Page,
    read_large,
)
from service.store.db.database import Database
from service.store.rows import MAX_PAGE_BYTES

Row = TypeVar("Row")

ListRows = Callable[[Connection, Row | None, int, int], Awaitable[Page[Row]]]
"""Reads the rows after a row, or the first rows of the page if it is None.

Gets a connection, the row, and the maximum number and bytes of the rows.
"""


async def read_page(
    database: Database, list_rows: ListRows[Row], page_size: int, owner_id: str, call: Call
) -> tuple[list[Row], bool]:
    """Read up to `page_size` rows.

    Args:
        database: The database.
        list_rows: Reads rows.
        page_size: Maximum number of rows.
        owner_id: The user in whose turn the reads wait.
        call: The call, which holds the bytes of a large page.

    Returns:
        The rows, fewer than `page_size` if MAX_PAGE_BYTES are reached, and whether there are more.

    Raises:
        Overloaded: the page is large, and there is no room for it.
    """
    limit = page_size + 1
    first_limit = min(limit, FIRST_READ_ROWS)
    page = await database.read(
        lambda connection: list_rows(connection, None, first_limit, HOT_READ_BYTES),
        owner_id=owner_id,
        deadline=call.deadline,
    )
    rows = page.rows
    is_cut = page.unread_bytes is not None
    if len(rows) >= limit or (not is_cut and len(rows) < first_limit):
        return rows[:page_size], len(rows) > page_size
    if is_cut and len(rows) == page_size:
        return rows, True
    last_row = rows[-1] if rows else None
    max_bytes = MAX_PAGE_BYTES - page.size_bytes
    rest = await read_large(
        database,
        call,
        max_bytes,
        lambda connection: list_rows(connection, last_row, limit - len(rows), max_bytes),
        owner_id=owner_id,
        deadline=call.deadline,
    )
    rows += rest.rows
    return rows[:page_size], len(rows) > page_size or rest.unread_bytes is not None
