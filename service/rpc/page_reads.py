"""Reads a page of a list in the two steps that `store/bounded_reads.py` describes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from service.rpc.call import Call
from service.store.bounded_reads import (
    FIRST_READ_ROWS,
    HOT_READ_BYTES,
    Connection,
    Page,
    read_large,
)
from service.store.db.readers import Reader
from service.store.rows import MAX_PAGE_BYTES

Row = TypeVar("Row")

ListRows = Callable[[Connection, Row | None, int, int], Awaitable[Page[Row]]]
"""Reads the rows after a row, or the first rows of the page if it is None.

Gets a connection, the row, and the maximum number and bytes of the rows.
"""


FIRST_LARGE_STEP = 8
"""Rows of the first statement of expensive work if rows are large. The next ones have twice as
many."""


async def read_page(
    database: Reader,
    name: str,
    list_rows: ListRows[Row],
    page_size: int,
    owner_id: str,
    call: Call,
) -> tuple[list[Row], bool]:
    """Read up to `page_size` rows.

    Args:
        database: The primary, or what may lag.
        name: Name of the list. If the user's last page of it was large, this one is read by
            expensive work from the start.
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
    large_reads = database.large_reads
    key = (name, owner_id)

    async def read_first(connection: Connection) -> Page[Row]:
        # A call that has waited for a connection may find that another one was large.
        if key in large_reads:
            return Page([], 0, 0)
        page = await list_rows(connection, None, first_limit, HOT_READ_BYTES)
        if page.unread_bytes is not None:
            large_reads.add(key)
        return page

    page: Page[Row] = Page([], 0, 0)
    if key not in large_reads:
        page = await database.read(read_first, owner_id=owner_id, deadline=call.deadline)
    rows = page.rows
    is_cut = page.unread_bytes is not None
    if len(rows) >= limit or (not is_cut and len(rows) < first_limit):
        return rows[:page_size], len(rows) > page_size
    if is_cut and len(rows) == page_size:
        return rows, True
    max_bytes = MAX_PAGE_BYTES - page.size_bytes
    step = FIRST_LARGE_STEP if is_cut else limit
    rest = await read_large(
        database,
        call,
        max_bytes,
        lambda connection: _read_in_steps(
            connection, list_rows, rows, limit - len(rows), max_bytes, step
        ),
        owner_id=owner_id,
        deadline=call.deadline,
    )
    if rest.unread_bytes is not None:
        large_reads.add(key)
    elif page.size_bytes + rest.size_bytes <= HOT_READ_BYTES:
        large_reads.discard(key)
    rows += rest.rows
    return rows[:page_size], len(rows) > page_size or rest.unread_bytes is not None


async def _read_in_steps(
    connection: Connection,
    list_rows: ListRows[Row],
    rows_before: Sequence[Row],
    limit: int,
    max_bytes: int,
    step: int,
) -> Page[Row]:
    """Read rows after others, in statements of increasing numbers of rows.

    A statement computes the sizes of all its rows, which takes long for large ones: the database
    converts them to text. Steps bound the rows beyond `max_bytes` whose sizes are computed.
    """
    page: Page[Row] = Page([], 0)
    last_row = rows_before[-1] if rows_before else None
    while True:
        count = min(step, limit - len(page.rows))
        next_page = await list_rows(connection, last_row, count, max_bytes - page.size_bytes)
        page.rows += next_page.rows
        page.size_bytes += next_page.size_bytes
        page.unread_bytes = next_page.unread_bytes
        is_end = len(next_page.rows) < count or len(page.rows) == limit
        if is_end or page.unread_bytes is not None:
            return page
        last_row = page.rows[-1]
        step *= 2
