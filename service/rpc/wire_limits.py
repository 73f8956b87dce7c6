"""Checks the limits of lists and Structs in serialized messages, before they are parsed.

The parser needs 30 ms for 1 MiB of small entries of a Struct, and all of the message's limits are
checked only afterwards. These checks end at the first limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

from buf.validate import validate_pb2

from service import errors
from service.rpc.convert_structs import MAX_VALUES, STRUCT, too_many_values
from service.rpc.wire import MalformedWire, read_fields, read_varint

CHECKED_BYTES = 128 * 1024
"""Smaller messages are parsed without a check: they take at most 5 ms."""
MAX_FIELDS = 10_000
"""Fields of one message, those of its messages not counted. The limits of the lists are lower."""
STEP_FIELDS = 4_000
"""Fields that are looked at between two pauses: 3 to 7 ms of work."""
MAX_STRUCT_FIELDS = 4 * MAX_VALUES
"""Fields on the wire of a Struct: at most four for a value, with its key."""
_VISITED_VALUE_BYTES = 16
"""Smaller values are not looked into: they contain few others."""

_STRUCT, _ENTRY, _VALUE, _LIST = range(4)
# The messages in a Struct by the tags under which they occur: Struct.fields, the value of an entry,
# Value.struct_value, Value.list_value, ListValue.values.
_CHILDREN = {
    (_STRUCT, 0x0A): _ENTRY,
    (_ENTRY, 0x12): _VALUE,
    (_VALUE, 0x2A): _STRUCT,
    (_VALUE, 0x32): _LIST,
    (_LIST, 0x0A): _VALUE,
}


def max_items(field: Any) -> int:
    """Return how often a field may occur on the wire; 0 for no check.

    A singular message that occurs twice is valid protobuf, but no library writes it. Lists of
    numbers are packed into one field.
    """
    if field.is_repeated:
        rules = field.GetOptions().Extensions[validate_pb2.field]
        return int(rules.repeated.max_items)
    return 1 if field.message_type is not None or field.name == "user_id" else 0


def check_message(data: bytes, start: int, end: int, descriptor: Any, path: str) -> Generator[None]:
    """Check the lists and Structs of a message in steps, and yield where the caller may pause.

    Args:
        data: The request.
        start: Where the message starts.
        end: Where it ends.
        descriptor: Its type.
        path: Its path in the request.

    Raises:
        InvalidArgument: a list or a Struct is too long.
        MalformedWire: it is not a message.
    """
    if descriptor.full_name == STRUCT:
        if (yield from _has_too_many_fields(data, start, end)):
            raise too_many_values(path)
        return
    counts: Counter[int] = Counter()
    for count, field in enumerate(read_fields(data, start, end)):
        definition = descriptor.fields_by_number.get(field.number)
        if definition is not None and (limit := max_items(definition)):
            counts[field.number] += 1
            if counts[field.number] > limit:
                raise too_many_items(f"{path}.{definition.name}", limit)
            if definition.message_type is not None and field.end - field.start > CHECKED_BYTES:
                index = f"[{counts[field.number] - 1}]" if definition.is_repeated else ""
                yield from check_message(
                    data,
                    field.value_start,
                    field.end,
                    definition.message_type,
                    f"{path}.{definition.name}{index}",
                )
        if count == MAX_FIELDS:
            raise MalformedWire
        if count % STEP_FIELDS == STEP_FIELDS - 1:
            yield


def too_many_items(path: str, limit: int) -> errors.InvalidArgument:
    """Return the error for a list that is too long."""
    return errors.InvalidArgument.field(path, f"must contain no more than {limit} item(s)")


def _has_too_many_fields(data: bytes, start: int, end: int) -> Generator[None, None, bool]:
    """Return whether a Struct has more than MAX_STRUCT_FIELDS fields on the wire, in steps.

    Values up to _VISITED_VALUE_BYTES count as one field. It does not recurse, since the nesting of
    the request has not been checked.
    """
    count = 0
    stack = [(start, end, _STRUCT)]
    while stack:
        position, end, kind = stack.pop()
        while position < end:
            count += 1
            if count > MAX_STRUCT_FIELDS:
                return True
            if count % STEP_FIELDS == 0:
                yield
            tag, position = read_varint(data, position)
            wire_type = tag & 7
            if wire_type == 2:  # noqa: PLR2004 - length-delimited
                length, position = read_varint(data, position)
                child = _CHILDREN.get((kind, tag))
                if child is not None and length > _VISITED_VALUE_BYTES:
                    stack.append((position, min(position + length, end), child))
                position += length
            elif wire_type == 0:
                _, position = read_varint(data, position)
            elif wire_type in (1, 5):  # fixed64, fixed32
                position += 8 if wire_type == 1 else 4
            else:
                raise MalformedWire
    return False
