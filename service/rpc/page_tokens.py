"""Opaque page tokens: a cursor and a digest that binds it to its list."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable
from typing import TypeVar

from service.errors import InvalidArgument
from service.ids import is_uuid
from service.store import users
from service.store.db.database import Database
from service.store.rows import datetime_from_us

Cursor = TypeVar("Cursor")

_DIGEST_BYTES = 8
_PURPOSE = b"chathistory.v1 page token"
_MAX_INT64 = 2**63 - 1
_INTEGER = re.compile("0|[1-9][0-9]{0,18}")


class PageTokens:
    """Makes the page tokens of all lists, with one key for all replicas of a deployment.

    Without a configured key it is derived from the time at which the database was set up, which is
    the same for all replicas and after a restart. It need not be secret: a token holds a cursor in
    the caller's own list, and grants no right to read it. A forged one leads to another page of it.
    """

    def __init__(self, database: Database, key: str | None) -> None:
        """Take the configured key, or None to derive one from the database."""
        self._database = database
        self._key = _derive(key.encode()) if key is not None else None

    async def of_list(self, owner_id: str, deadline: float, *list_key: object) -> ListTokens:
        """Return the tokens of one list.

        Args:
            owner_id: The user for whom the call runs.
            deadline: When the call ends, on the loop's clock.
            list_key: The RPC, and the fields of the request that determine the list.
        """
        key = self._key
        if key is None:
            set_up_us = await self._database.read(
                users.set_up_us, owner_id=owner_id, deadline=deadline
            )
            key = self._key = _derive(b"database %d" % set_up_us)
        return ListTokens(key, list_key)


class ListTokens:
    """The page tokens of one list, which are valid for no other list."""

    __slots__ = ("_key", "_list_bytes")

    def __init__(self, key: bytes, list_key: tuple[object, ...]) -> None:
        self._key = key
        self._list_bytes = b"\0" + "\0".join(map(str, list_key)).encode()

    def make(self, cursor: str) -> str:
        """Return the token of the page after a cursor."""
        return self._encode(cursor.encode())

    def read(self, token: str, parse: Callable[[str], Cursor]) -> Cursor | None:
        """Return the cursor in a token; None for the first page.

        Args:
            token: The token of the request.
            parse: Returns the cursor of a text, or raises ValueError.

        Raises:
            InvalidArgument: it is not a token of this list (BAD_PAGE_TOKEN).
        """
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            payload = raw[_DIGEST_BYTES:]
            # The text is compared, since base64 has several spellings of one value.
            if not hmac.compare_digest(self._encode(payload), token):
                raise _bad_page_token()
            return parse(payload.decode())
        except (binascii.Error, ValueError, TypeError, OverflowError):
            raise _bad_page_token() from None

    def _encode(self, payload: bytes) -> str:
        digest = hashlib.blake2b(
            payload + self._list_bytes, digest_size=_DIGEST_BYTES, key=self._key
        ).digest()
        return base64.urlsafe_b64encode(digest + payload).decode().rstrip("=")


def parse_integer(text: str) -> int:
    """Return the integer from 0 to 2^63 - 1 in a cursor.

    Raises:
        ValueError: the text is not the decimal form of one.
    """
    if not _INTEGER.fullmatch(text) or int(text) > _MAX_INT64:
        raise ValueError("not an integer of 64 bits")
    return int(text)


def parse_index(text: str) -> int:
    """Return the integer from 0 to 2^31 - 1 in a cursor; raise ValueError as `parse_integer`."""
    index = parse_integer(text)
    if index >= 2**31:
        raise ValueError("not an integer of 32 bits")
    return index


def parse_id(text: str) -> str:
    """Return the id in a cursor; raise ValueError if it is not a canonical UUID."""
    if not is_uuid(text):
        raise ValueError("not an id")
    return text


def parse_time_us(text: str) -> int:
    """Return the time in a cursor, in microseconds since 1970.

    Raises:
        ValueError: the text is not a time.
        OverflowError: the time is out of range.
    """
    time_us = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else parse_integer(text)
    datetime_from_us(time_us)
    return time_us


def _derive(secret: bytes) -> bytes:
    return hashlib.blake2b(_PURPOSE + b"\0" + secret, digest_size=32).digest()


def _bad_page_token() -> InvalidArgument:
    return InvalidArgument(
        "page_token is not from an earlier page of this list; repeat that page's request with it, "
        "or leave it empty for the first page",
        reason="BAD_PAGE_TOKEN",
    )
