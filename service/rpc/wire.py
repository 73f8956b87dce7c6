"""Reads the top level of a serialized protobuf message, without parsing it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class WireField(NamedTuple):
    """One field as it is on the wire."""

    number: int
    start: int
    """Position of its tag."""
    value_start: int
    """Position of its value: after the length, if it has one."""
    end: int
    is_length_delimited: bool


class MalformedWire(ValueError):
    """The bytes are not a sequence of fields."""


def read_fields(data: bytes, start: int = 0, end: int | None = None) -> Iterator[WireField]:
    """Iterate over the fields of a message that takes all of the data, or a part of it.

    Raises:
        MalformedWire: a field is cut short, or is a group, which proto3 does not have.
    """
    position = start
    end = len(data) if end is None else end
    while position < end:
        start = position
        tag, position = read_varint(data, position)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, value_start = read_varint(data, position)
            position = value_start + length
        else:
            value_start = position
            if wire_type == _VARINT:
                _, position = read_varint(data, position)
            elif wire_type == _FIXED64:
                position += 8
            elif wire_type == _FIXED32:
                position += 4
            else:
                raise MalformedWire
        if position > end or tag < 8:  # noqa: PLR2004 - field numbers start at 1
            raise MalformedWire
        yield WireField(tag >> 3, start, value_start, position, wire_type == _LENGTH_DELIMITED)


def delimited(number: int, value: bytes) -> bytes:
    """Return a length-delimited field."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a varint and the position after it.

    Raises:
        MalformedWire: it is cut short or too long.
    """
    if position < len(data) and (first := data[position]) < 0x80:  # noqa: PLR2004 - as below
        return first, position + 1
    value = shift = 0
    for byte in data[position : position + _MAX_VARINT_BYTES]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that announces another byte
            return value, position
        shift += 7
    raise MalformedWire


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - as in read_varint
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
