"""Page sizes, and opaque page tokens bound to the request that they belong to."""

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
"""Where a reply stops: clients refuse more than 4 MiB by default."""

_DIGEST_BYTES = 8
# Tells our tokens from anything else; no secret: a token holds a place in the caller's own list and gives no right to read it.
_KEY = b"chathistory.v1 page token"


def page_size(asked: int) -> int:
    """Return how many entries a page holds at the most."""
    return min(asked, MAX_PAGE_SIZE) if asked else DEFAULT_PAGE_SIZE


def cut(
    rows: Sequence[Row],
    convert: Callable[[Row], Resource],
    token: Callable[[Row], str],
    *,
    more: bool,
) -> tuple[list[Resource], str]:
    """Make a page of rows; `more` says whether the list goes on after them.

    Returns:
        The resources, as many as fit into a reply, and the next page's token, empty when there is none.
    """
    page: list[Resource] = []
    total = 0
    for row in rows:
        resource = convert(row)
        total += resource.ByteSize()
        if page and total > MAX_REPLY_BYTES:
            more = True
            break
        page.append(resource)
    return page, token(rows[len(page) - 1]) if more and page else ""


def fitting(rows: Sequence[MessageRow]) -> Sequence[MessageRow]:
    """Return as many messages as fit into a reply, at least one, by the sizes that are stored with them."""
    total = 0
    for n, row in enumerate(rows):
        total += row.size
        if total > MAX_REPLY_BYTES and n:
            return rows[:n]
    return rows


def token(place: str, *request: object) -> str:
    """Return the token of the page after `place`, for requests of which these values are the same."""
    payload = place.encode()
    return base64.urlsafe_b64encode(_digest(payload, request) + payload).decode().rstrip("=")


def place(text: str, *request: object) -> str | None:
    """Return the place that a token holds, None for the first page.

    Raises:
        InvalidArgument: it is no token of ours, or of another request (BAD_PAGE_TOKEN).
    """
    if not text:
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _bad() from None
    digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    # Comparing the text too: several spellings in base64 are one value.
    if (
        not hmac.compare_digest(digest, _digest(payload, request))
        or token(payload.decode(), *request) != text
    ):
        raise _bad()
    return payload.decode()


def _digest(payload: bytes, request: tuple[object, ...]) -> bytes:
    bound = "\0".join(map(str, request)).encode()
    return hashlib.blake2b(payload + b"\0" + bound, digest_size=_DIGEST_BYTES, key=_KEY).digest()


def _bad() -> InvalidArgument:
    return InvalidArgument(
        "the page token does not belong to this request", reason="BAD_PAGE_TOKEN"
    )
