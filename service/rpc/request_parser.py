"""Parses requests, large ones in slices, and rejects early those that would take long.

Parsing and validation cost time for each element, however small: 4 MiB can hold two million empty
messages, which take 60 ms to parse and 5 s to validate. The top level of a large request is
therefore read first, and compared with the limits of the protos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from service import errors
from service.rpc.convert import MAX_MESSAGE_BYTES
from service.rpc.convert_structs import STRUCT, TOO_DEEP
from service.rpc.wire import MalformedWire, WireField, delimited, read_fields
from service.rpc.wire_limits import (
    CHECKED_BYTES,
    check_message,
    max_items,
    too_many_items,
)

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Limit of a request after decompression. Larger ones are rejected with REQUEST_TOO_LARGE."""
LARGE_REQUEST_BYTES = 64 * 1024
"""Larger requests are scanned, and parsed in slices."""
SLICE_BYTES = 256 * 1024
"""Bytes that are parsed at a time, unless one field has more."""
MAX_REQUEST_FIELDS = 2_000
"""Fields on the top level of a large request: a scan takes 4 ms. The longest list has 1,000."""
MAX_SEARCHED_FIELDS = 1_000
"""Fields of a message among which a Struct that cannot be parsed is searched for."""


class _Slice(NamedTuple):
    """Fields of a request that are parsed together."""

    start: int
    end: int
    large: list[tuple[WireField, str]]
    """The messages in it that are checked before they are parsed, each with its path."""


class ScannedRequest:
    """A large request whose top level has been checked, and which is not parsed yet."""

    def __init__(self, parser: RequestParser, data: bytes) -> None:
        """Scan a request.

        Raises:
            InvalidArgument: it is malformed, or one of its fields exceeds a limit.
        """
        self.user_id = ""
        """The request's `user_id`, which the admission of the call needs."""
        self._parser = parser
        self._data = data
        self._slices: list[_Slice] = []
        self._counts: Counter[int] = Counter()
        self._total_bytes: Counter[int] = Counter()
        try:
            self._scan()
        except MalformedWire:
            raise _malformed_request() from None

    def _scan(self) -> None:
        slice_start = previous_end = 0
        large: list[tuple[WireField, str]] = []
        for count, field in enumerate(read_fields(self._data)):
            if count == MAX_REQUEST_FIELDS:
                raise MalformedWire
            path = self._check(field)
            if field.end - slice_start > SLICE_BYTES and previous_end > slice_start:
                self._slices.append(_Slice(slice_start, previous_end, large))
                slice_start, large = previous_end, []
            if path and field.end - field.value_start > CHECKED_BYTES:
                large.append((field, path))
            previous_end = field.end
        self._slices.append(_Slice(slice_start, previous_end, large))

    def _check(self, field: WireField) -> str | None:
        """Check one field; return its path if it is a message."""
        limit = self._parser.limits.get(field.number)
        if limit is None:
            return None
        descriptor, max_count = limit
        self._counts[field.number] += 1
        size_bytes = field.end - field.value_start
        self._total_bytes[field.number] += size_bytes
        if self._counts[field.number] > max_count:
            if descriptor.is_repeated:
                raise too_many_items(descriptor.name, max_count)
            raise MalformedWire
        if descriptor.message_type is None:
            if descriptor.name == "user_id":
                value = self._data[field.value_start : field.end]
                self.user_id = value.decode(errors="replace")
            return None
        index = f"[{self._counts[field.number] - 1}]" if descriptor.is_repeated else ""
        path: str = descriptor.name + index
        if size_bytes > MAX_MESSAGE_BYTES:
            raise errors.InvalidArgument.field(path, f"must be at most {MAX_MESSAGE_BYTES} bytes")
        if descriptor.name == "chunks" and self._total_bytes[field.number] > MAX_MESSAGE_BYTES:
            raise errors.InvalidArgument.field(
                "chunks", f"must be at most {MAX_MESSAGE_BYTES} bytes together"
            )
        return path

    async def parse(self, pause: Callable[[], Awaitable[None]]) -> Any:
        """Parse the request, and pause before each slice and between the steps of its checks.

        Raises:
            InvalidArgument: it is malformed, or a list or a Struct in it exceeds a limit.
        """
        parser = self._parser
        request = parser.message_class()
        for start, end, large in self._slices:
            await pause()
            try:
                for field, path in large:
                    kind = parser.limits[field.number][0].message_type
                    for _ in check_message(self._data, field.value_start, field.end, kind, path):
                        await pause()
                request.MergeFromString(self._data[start:end])
            except MalformedWire:
                raise _malformed_request() from None
            except (DecodeError, ValueError) as error:
                raise parser.explain(error, self._data, start, end) from None
        return request


class RequestParser:
    """Parses the requests of one method."""

    def __init__(self, message_class: type[Message]) -> None:
        self.message_class = message_class
        self.limits = {
            field.number: (field, max_count)
            for field in message_class.DESCRIPTOR.fields
            if (max_count := max_items(field))
        }
        """The fields that a scan checks, with their greatest number of occurrences."""

    def parse(self, data: bytes) -> Any:
        """Parse a request, or scan it if it is large.

        Returns:
            The request if it has at most LARGE_REQUEST_BYTES, else a ScannedRequest.

        Raises:
            TooLarge: it is too large.
            InvalidArgument: as `ScannedRequest` and its `parse`.
        """
        if len(data) > LARGE_REQUEST_BYTES:
            if len(data) > MAX_REQUEST_BYTES:
                raise errors.TooLarge(
                    f"the request is larger than {MAX_REQUEST_BYTES} bytes; split it"
                )
            return ScannedRequest(self, data)
        try:
            return self.message_class.FromString(data)
        except (DecodeError, ValueError) as error:
            raise self.explain(error, data, 0, len(data)) from None

    def explain(
        self, error: Exception, data: bytes, start: int, end: int
    ) -> errors.InvalidArgument:
        """Return the error for the client when the fields between two positions cannot be parsed.

        A Struct that is nested too deeply for the parser gets the same error as one that is nested
        too deeply for us.
        """
        if "MaxDepth" in str(error):
            try:
                path = self._deep_struct(data, start, end, self.message_class.DESCRIPTOR, bytes)
            except MalformedWire:
                path = None
            if path is not None:
                return errors.InvalidArgument.field(path, TOO_DEEP)
        return _malformed_request()

    def _deep_struct(
        self,
        data: bytes,
        start: int,
        end: int,
        descriptor: Any,
        wrap: Callable[[bytes], bytes],
    ) -> str | None:
        """Return the path of the first Struct that makes the parser fail.

        None if it is not among the first MAX_SEARCHED_FIELDS fields of a message, each of which is
        parsed alone.

        Args:
            data: A message.
            start: The first position of its fields in question.
            end: The position after them.
            descriptor: The type of the message.
            wrap: Returns a request with nothing but the given fields of the message.
        """
        counts: Counter[int] = Counter()
        for field in islice(read_fields(data), MAX_SEARCHED_FIELDS):
            counts[field.number] += 1
            definition = descriptor.fields_by_number.get(field.number)
            if definition is None or definition.message_type is None:
                continue
            if field.start < start or field.end > end or not field.is_length_delimited:
                continue
            try:
                self.message_class.FromString(wrap(data[field.start : field.end]))
            except (DecodeError, ValueError):
                index = f"[{counts[field.number] - 1}]" if definition.is_repeated else ""
                path: str = definition.name + index
                if definition.message_type.full_name == STRUCT:
                    return path
                value = data[field.value_start : field.end]
                inner = self._deep_struct(
                    value,
                    0,
                    len(value),
                    definition.message_type,
                    partial(_wrapped, wrap, field.number),
                )
                return f"{path}.{inner}" if inner else None
        return None


def _wrapped(wrap: Callable[[bytes], bytes], number: int, fields: bytes) -> bytes:
    return wrap(delimited(number, fields))


def _malformed_request() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "the request cannot be parsed: it is not a valid protobuf message of this method's type",
        reason="MALFORMED_REQUEST",
    )
