"""Keyset pagination: page sizes, and pages that end before their reply is too large."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from service.rpc.conversion_turns import STEP_VALUES, count_values

Row = TypeVar("Row")
Resource = TypeVar("Resource", bound=Message)

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

MAX_REPLY_BYTES = 3 * 1024 * 1024
"""A page ends before its reply exceeds this: clients reject more than 4 MiB by default."""


def effective_page_size(requested: int) -> int:
    """Return the maximum number of rows of a page, given the request's `page_size`."""
    return min(requested, MAX_PAGE_SIZE) if requested else DEFAULT_PAGE_SIZE


async def build_page(
    rows: Sequence[Row],
    convert: Callable[[Row], Resource],
    token_after: Callable[[Row], str],
    pause: Callable[[], Awaitable[None]],
    *,
    has_more: bool,
) -> tuple[list[Resource], str]:
    """Convert the rows of a page, as many as fit into a reply.

    Args:
        rows: The rows.
        convert: Returns the resource of a row.
        token_after: Returns the page token of the rows after a row.
        pause: Awaited after every STEP_VALUES values of metadata.
        has_more: Whether the list continues after the rows.

    Returns:
        The resources, and the next page's token, which is empty on the last page.
    """
    page: list[Resource] = []
    total_bytes = 0
    remaining_values = STEP_VALUES
    for row in rows:
        value_count = count_values(getattr(row, "metadata", None))
        remaining_values -= value_count
        if remaining_values < 0:
            await pause()
            remaining_values = STEP_VALUES - value_count
        resource = convert(row)
        total_bytes += resource.ByteSize()
        if page and total_bytes > MAX_REPLY_BYTES:
            has_more = True
            break
        page.append(resource)
    return page, token_after(rows[len(page) - 1]) if has_more and page else ""
