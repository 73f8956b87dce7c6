"""Keyset pagination: page sizes, and opaque page tokens that are bound to their list."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from service.errors import InvalidArgument
from service.store.rows import MessageRow

Row = TypeVar("Row")
Resource = TypeVar("Resource", bound=Message)

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

MAX_REPLY_BYTES = 3 * 1024 * 1024
"""A page ends before its reply exceeds this: clients reject more than 4 MiB by default."""

_DIGEST_BYTES = 8
# Distinguishes our tokens from other text. It is not a secret: a token holds a cursor in the
# caller's own list, and grants no right to read it.
_KEY = b"chathistory.v1 page token"


def effective_page_size(requested: int) -> int:
    """Return the maximum number of rows of a page, given the request's `page_size`."""
    return min(requested, MAX_PAGE_SIZE) if requested else DEFAULT_PAGE_SIZE


def build_page(
    rows: Sequence[Row],
    convert: Callable[[Row], Resource],
    token_after: Callable[[Row], str],
    *,
    has_more: bool,
) -> tuple[list[Resource], str]:
    """Convert the rows of a page, as many as fit into a reply.

    Args:
        rows: The rows.
        convert: Returns the resource of a row.
        token_after: Returns the page token of the rows after a row.
        has_more: Whether the list continues after the rows.

    Returns:
        The resources, and the next page's token, which is empty on the last page.
    """
    page: list[Resource] = []
    total_bytes = 0
    for row in rows:
        resource = convert(row)
        total_bytes += resource.ByteSize()
        if page and total_bytes > MAX_REPLY_BYTES:
            has_more = True
            break
        page.append(resource)
    return page, token_after(rows[len(page) - 1]) if has_more and page else ""


def fitting_messages(rows: Sequence[MessageRow]) -> Sequence[MessageRow]:
    """Return as many messages as fit into a reply, at least one, by their stored sizes."""
    total_bytes = 0
    for index, row in enumerate(rows):
        total_bytes += row.size
        if total_bytes > MAX_REPLY_BYTES and index:
            return rows[:index]
    return rows


def make_token(cursor: str, *list_key: object) -> str:
    """Return the token of the page after `cursor`.

    It is valid only for the same list: `list_key` holds the RPC and the fields of the request that
    determine the list.
    """
    payload = cursor.encode()
    return base64.urlsafe_b64encode(_digest(payload, list_key) + payload).decode().rstrip("=")


def read_token(token: str, *list_key: object) -> str | None:
    """Return the cursor in a token; None for the first page.

    Raises:
        InvalidArgument: it is not a token of this list (BAD_PAGE_TOKEN).
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _bad_page_token() from None
    digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    # The text is compared too: base64 has several spellings of one value.
    if (
        not hmac.compare_digest(digest, _digest(payload, list_key))
        or make_token(payload.decode(), *list_key) != token
    ):
        raise _bad_page_token()
    return payload.decode()


def _digest(payload: bytes, list_key: tuple[object, ...]) -> bytes:
    list_bytes = "\0".join(map(str, list_key)).encode()
    return hashlib.blake2b(
        payload + b"\0" + list_bytes, digest_size=_DIGEST_BYTES, key=_KEY
    ).digest()


def _bad_page_token() -> InvalidArgument:
    return InvalidArgument(
        "page_token is not from an earlier page of this list; repeat that page's request with it, "
        "or leave it empty for the first page",
        reason="BAD_PAGE_TOKEN",
    )
