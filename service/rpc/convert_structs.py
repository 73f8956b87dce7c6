"""Conversion of Structs to JSON, with their limits.

The limits bound the time that a Struct takes to convert, since small values cost as much time as
large ones: a message of 1 MiB can hold 500,000 of them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from service.errors import InvalidArgument

MAX_METADATA_BYTES = 16 * 1024
MAX_VALUES = 10_000
"""Values in all Structs of one message, session, user or document."""
MAX_REQUEST_VALUES = 50_000
"""Values in all Structs of one request."""
MAX_DIGITS = 1024 * 1024
"""Digits of the numbers of 20 and more digits in one message. PostgreSQL's text of jsonb has no
exponents: 1e308 becomes 309 digits."""
MAX_DEPTH = 32
"""Levels of objects and arrays. With more, replies that contain the Struct could not be parsed:
protobuf limits the nesting of its messages to 100, and an object takes three of them."""

_MIN_SHORT, _MAX_SHORT = 1e-15, 1e20
"""Between them, numbers have few digits."""

STRUCT = "google.protobuf.Struct"
"""Full name of the type."""
TOO_DEEP = f"must have at most {MAX_DEPTH} levels of objects and arrays"
"""The description of a violation of MAX_DEPTH."""


class StructReader:
    """Converts the Structs of one request, and counts their values."""

    __slots__ = ("_field", "_message_limit", "_remaining", "_request_remaining", "digit_count")

    def __init__(self) -> None:
        self._field = ""
        self._request_remaining = MAX_REQUEST_VALUES
        self._message_limit = self._remaining = MAX_VALUES
        self.digit_count = 0
        """Digits of the numbers of 20 and more digits in the present message."""

    @property
    def request_value_count(self) -> int:
        """Values of all messages converted so far."""
        return MAX_REQUEST_VALUES - self._request_remaining + self._message_limit - self._remaining

    def start_message(self) -> None:
        """Count the values of the next message from zero; those of the request continue."""
        self._request_remaining -= self._message_limit - self._remaining
        self._message_limit = self._remaining = min(MAX_VALUES, self._request_remaining)
        self.digit_count = 0

    def read(self, struct: Struct, field: str) -> dict[str, Any]:
        """Return a Struct as a dict; `field` is its path in the request.

        Raises:
            InvalidArgument: it holds NUL, NaN or an infinity, or exceeds a limit.
        """
        self._field = field
        return self._read_object(struct, 1)

    def _read_object(self, struct: Struct, depth: int) -> dict[str, Any]:
        self._check_depth(depth)
        result: dict[str, Any] = {}
        for key, value in struct.fields.items():
            if "\0" in key:
                raise self._error("must not contain NUL")
            result[key] = self._read_value(value, depth)
        return result

    def _read_value(self, value: Value, depth: int) -> Any:
        if not self._remaining:
            raise self._too_many_values()
        self._remaining -= 1
        match value.WhichOneof("kind"):
            case "string_value":
                if "\0" in value.string_value:
                    raise self._error("must not contain NUL")
                return value.string_value
            case "number_value":
                if not math.isfinite(value.number_value):
                    raise self._error("must not contain NaN or an infinity")
                if value.number_value and not _MIN_SHORT < abs(value.number_value) < _MAX_SHORT:
                    self._count_digits(value.number_value)
                return value.number_value
            case "bool_value":
                return value.bool_value
            case "struct_value":
                return self._read_object(value.struct_value, depth + 1)
            case "list_value":
                self._check_depth(depth + 1)
                return [self._read_value(item, depth + 1) for item in value.list_value.values]
            case _:
                return None

    def _count_digits(self, number: float) -> None:
        self.digit_count += round(abs(math.log10(abs(number))))
        if self.digit_count > MAX_DIGITS:
            raise self._error(
                f"must have at most {MAX_DIGITS} digits in numbers of 20 and more digits; 1e308 "
                "has 309 digits"
            )

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(TOO_DEEP)

    def _too_many_values(self) -> InvalidArgument:
        if self._message_limit < MAX_VALUES:
            return self._error(
                f"the request has more than {MAX_REQUEST_VALUES} values in its Structs; send the "
                "messages in several requests"
            )
        return too_many_values(self._field)

    def _error(self, description: str) -> InvalidArgument:
        return InvalidArgument.field(self._field, description)


def too_many_values(field: str) -> InvalidArgument:
    """Return the error for a Struct at a path that exceeds MAX_VALUES."""
    return InvalidArgument.field(
        field,
        f"must have at most {MAX_VALUES} values, with the other Structs of the resource counted",
    )


def metadata_json(struct: Struct, field: str, reader: StructReader | None = None) -> str | None:
    """Return the metadata of a resource as JSON; None if it is empty.

    Raises:
        InvalidArgument: it is larger than 16 KiB, or as `StructReader.read`.
    """
    if not struct.fields:
        return None
    if struct.ByteSize() > MAX_METADATA_BYTES:
        raise InvalidArgument.field(field, f"must be at most {MAX_METADATA_BYTES} bytes")
    return dump_json((reader or StructReader()).read(struct, field))


_STRINGS_AND_NUMBERS = re.compile(r'"[^"]*"|\de[+-](\d+)|\d{20,}')


def count_digits(json_text: str | None) -> int:
    """Return the digits that the database writes for a JSON text's numbers of 20 and more digits.

    Args:
        json_text: The text, of Python or of PostgreSQL.
    """
    if json_text is None:
        return 0
    # A pattern that knows escapes would take 0.1 s for a string of 1 MiB.
    without_escapes = json_text.replace(r"\\", "").replace(r"\"", "")
    total = 0
    for match in _STRINGS_AND_NUMBERS.finditer(without_escapes):
        if match[1]:
            total += int(match[1])
        elif match[0][0] != '"':
            total += len(match[0])
    return total


def dump_json(value: Any) -> str:
    """Return a value as compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
