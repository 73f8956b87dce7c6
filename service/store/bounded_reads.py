"""Reads that are bounded by bytes: no read holds more memory than its call has accounted for.

A page is read in up to two steps. The first one returns at most HOT_READ_BYTES, and is all that the
usual page needs: a hot statement for messages, ordinary work of at most FIRST_READ_ROWS rows for
everything else. A page that is larger is continued by expensive work (`read_large`), which holds
its bytes until the call ends. The sizes are summed in the statement, so that no text beyond the
bound is read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Overloaded
from service.store.db.readers import Reader
from service.store.db.work_class import WorkClass

HOT_READ_BYTES = 256 * 1024
"""Bytes of rows that the first read of a page returns, at most.

A batched statement has up to 16 requests, and four of one kind are in flight: 16 MiB. With pages of
3 MiB they would be 192 MiB.
"""
STREAM_PAGE_BYTES = 64 * 1024
"""Bytes of rows that a stream holds, at most, while its client does not read.

A larger row is held alone.
"""
FIRST_READ_ROWS = 100
"""Rows that the first read of a page returns, at most, unless it is a hot statement."""

RowT = TypeVar("RowT")
Connection = AsyncConnection
"""The type for callers, which do not import SQLAlchemy."""


class Budget(Protocol):
    """Accounts for the bytes that a unary call holds; `service.rpc.call.Call` does."""

    def charge(self, n_bytes: int) -> None:
        """Hold bytes until the call ends, or raise Overloaded."""

    def release(self, n_bytes: int) -> None:
        """Hold bytes no longer."""


class StreamBudget(Protocol):
    """Accounts for the bytes that a stream holds; `service.rpc.call.Call` does."""

    async def reserve(self, n_bytes: int) -> None:
        """Wait until there is room for bytes, and hold them."""

    def release(self, n_bytes: int) -> None:
        """Hold bytes no longer."""


class _Unlimited:
    """A budget without a limit, for a process that does one export."""

    async def reserve(self, n_bytes: int) -> None:
        pass

    def release(self, n_bytes: int) -> None:
        pass


UNLIMITED = _Unlimited()


@dataclass(slots=True)
class Page(Generic[RowT]):
    """Rows that a bounded read has returned."""

    rows: list[RowT]
    size_bytes: int
    """Size of these rows."""
    unread_bytes: int | None = None
    """Size of the next row if the bound in bytes has left it out."""


async def read_large(
    database: Reader,
    budget: Budget,
    max_bytes: int,
    read: Callable[[AsyncConnection], Awaitable[Page[RowT]]],
    *,
    owner_id: str,
    deadline: float,
) -> Page[RowT]:
    """Run an expensive read of at most `max_bytes`.

    The call holds these bytes while the statement runs, and those of the rows until it ends.

    Raises:
        Overloaded: the budget has no room, or too much expensive work waits.
        Unavailable, Conflict, DeadlineExceeded: as `Database.read`.
    """
    is_charged = False

    async def work(connection: AsyncConnection) -> Page[RowT]:
        nonlocal is_charged
        # Not before there is a connection: work that waits for its turn holds nothing.
        if not is_charged:
            budget.charge(max_bytes)
            is_charged = True
        return await read(connection)

    page = await database.read(
        work, owner_id=owner_id, deadline=deadline, work_class=WorkClass.EXPENSIVE
    )
    budget.release(max_bytes - page.size_bytes)
    return page


async def read_held(
    budget: StreamBudget,
    read: Callable[[int, float], Awaitable[Page[RowT]]],
    timeout_s: float,
    max_bytes: int = STREAM_PAGE_BYTES,
) -> Page[RowT]:
    """Read the next page of a stream, which holds the page's bytes; the caller releases them.

    The stream waits for room before it reads, so that the rows of slow clients stay in the
    database. A row that is larger than `max_bytes` is a page of its own.

    Args:
        budget: The stream's budget. The stream holds nothing yet, or streams could wait for each
            other.
        read: Expensive work; is passed the maximum bytes of the page and a deadline.
        timeout_s: Seconds for each read, without the wait for room.
        max_bytes: Bytes of the page.

    Raises:
        Overloaded: too much expensive work has waited for that long.
        Unavailable, Conflict, DeadlineExceeded: as `Database.read`.
    """
    while True:
        await budget.reserve(max_bytes)
        page = await _read_when_admitted(partial(read, max_bytes), timeout_s)
        budget.release(max_bytes - page.size_bytes)
        if page.rows or page.unread_bytes is None:
            return page
        max_bytes = page.unread_bytes


async def _read_when_admitted(
    read: Callable[[float], Awaitable[Page[RowT]]], timeout_s: float
) -> Page[RowT]:
    """Repeat a read that is rejected: a client could not continue the stream where it ended."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        try:
            return await read(deadline)
        except Overloaded as error:
            pause_s = (error.retry_after or 1.0) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            if loop.time() + pause_s > deadline:
                raise
            await asyncio.sleep(pause_s)


async def fetch_bounded(
    connection: AsyncConnection,
    candidates: sa.Select[Any],
    row_type: Callable[[Sequence[Any]], RowT],
    columns: Callable[[sa.FromClause], Sequence[sa.ColumnElement[Any]]],
    size: Callable[[sa.FromClause], sa.ColumnElement[int]],
    order: Callable[[sa.FromClause], Sequence[sa.ColumnElement[Any]]],
    max_bytes: int,
) -> Page[RowT]:
    """Run a query and return its first rows that have `max_bytes` together.

    Args:
        connection: The connection, in a transaction.
        candidates: The rows of the table, ordered and limited in number.
        row_type: Makes a row of the columns.
        columns: Returns the columns of a row.
        size: Returns the expression of a row's size in bytes.
        order: Returns the order of the rows, which is that of `candidates`.
        max_bytes: Maximum bytes of the rows.
    """
    rows = candidates.subquery("candidates")
    # OFFSET is a fence: the size of a row is computed once.
    sized = sa.select(rows, size(rows).label("row_bytes")).offset(sa.literal_column("0"))
    rows = sized.subquery("sized")
    running_bytes = sa.func.sum(rows.c.row_bytes).over(order_by=order(rows), rows=(None, 0))
    rows = sa.select(rows, running_bytes.label("running_bytes")).subquery("bounded")
    fits = rows.c.running_bytes <= max_bytes
    query = (
        # Of the first row that does not fit, only the size is read.
        sa.select(*(sa.case((fits, column)) for column in columns(rows)), fits, rows.c.row_bytes)
        .where(rows.c.running_bytes - rows.c.row_bytes <= max_bytes)
        .order_by(*order(rows))
    )
    page: Page[RowT] = Page([], 0)
    for *values, is_read, row_bytes in await connection.execute(query):
        if is_read:
            page.rows.append(row_type(values))
            page.size_bytes += row_bytes
        else:
            page.unread_bytes = row_bytes
    return page
