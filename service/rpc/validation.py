"""Validation of requests by the rules of the protos.

The messages in a large request are validated in steps, between which the loop runs other tasks: 100
messages of 64 parts take 25 ms together, and 1,000 chunks with vectors 15 ms.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from typing import Any

import protovalidate
from google.protobuf.message import Message

from service.errors import MAX_VIOLATIONS, FieldViolation, InvalidArgument
from service.rpc.convert_structs import STRUCT
from service.rpc.wire_limits import max_items, too_many_items

STEP_MESSAGES = 500
"""Messages and their parts that are validated between two pauses."""
STEP_BYTES = 64 * 1024
"""Bytes that are validated between two pauses. Each number of a vector has a rule."""
FIRST_STEP_MESSAGES = 100
"""Messages that are validated before the first pause: several calls may do that in one turn."""
MAX_COUNTED_ELEMENTS = 32
"""Elements of an invalid message up to which all its violations are collected. Each of them takes
50 µs, longer than the validation of many elements."""

_WELL_KNOWN = "google.protobuf"
"""The package of types without rules of their own."""


class RequestValidator:
    """Checks requests, and names the fields that break a rule."""

    def __init__(self) -> None:
        self._collect = protovalidate.Validator().collect_violations

    def validate(self, request: Message) -> None:
        """Check a small request.

        Raises:
            InvalidArgument: it breaks rules. Some more than MAX_VIOLATIONS are named at most, and
                only the first one of a message with more than MAX_COUNTED_ELEMENTS elements.
        """
        if not self._collect(request, fail_fast=True):
            return
        violations: list[FieldViolation] = []
        for path, message in _split(request):
            violations += self._violations(path, message)
            if len(violations) > MAX_VIOLATIONS:
                break
        raise InvalidArgument.fields(tuple(violations))

    async def validate_in_turns(
        self, request: Message, pause: Callable[[], Awaitable[None]]
    ) -> None:
        """Check a large request, and pause between its messages.

        Args:
            request: The request.
            pause: Lets the loop run other tasks.

        Raises:
            InvalidArgument: as `validate`; only the violations up to the next pause are named.
        """
        violations: list[FieldViolation] = []
        message_count, step_bytes = STEP_MESSAGES - FIRST_STEP_MESSAGES, 0
        for path, message in _split(request):
            message_count += _count_messages(message)
            step_bytes += message.ByteSize()
            if message_count > STEP_MESSAGES or step_bytes > STEP_BYTES:
                if violations:
                    break
                await pause()
                message_count = step_bytes = 0
            violations += self._violations(path, message)
            if len(violations) > MAX_VIOLATIONS:
                break
        if violations:
            raise InvalidArgument.fields(tuple(violations))

    def _violations(self, path: str, message: Message) -> list[FieldViolation]:
        """Return the violations in a message that `_split` has returned with its path."""
        if not path:
            # Its messages are empty, and break rules that those of the request may not break.
            outline = [_named(violation, "") for violation in self._collect(message)]
            return [violation for violation in outline if "." not in violation.field]
        violations = self._collect(message, fail_fast=True)
        if violations and _count_elements(message) <= MAX_COUNTED_ELEMENTS:
            violations = self._collect(message)
        return [_named(violation, path) for violation in violations]


def _split(request: Message) -> Iterator[tuple[str, Message]]:
    """Yield the outline of a request, with an empty path, and the messages in it with theirs.

    In the outline the messages are empty, and each list of messages has one: such lists may be
    required to have an element, and their greatest length is checked here.

    Raises:
        InvalidArgument: a list of messages is too long.
    """
    outline: Any = type(request)()
    messages: list[tuple[Any, Any]] = []
    for field, value in request.ListFields():
        if not _is_split(field):
            # Also the well-known types, whose values a rule of the field may concern.
            _copy(outline, field, value)
        elif field.is_repeated:
            if 0 < _max_items(field) < len(value):
                raise too_many_items(field.name, _max_items(field))
            getattr(outline, field.name).add()
            messages.append((field, value))
        else:
            getattr(outline, field.name).SetInParent()
            messages.append((field, value))
    yield "", outline
    for field, value in messages:
        if field.is_repeated:
            for index, message in enumerate(value):
                yield f"{field.name}[{index}]", message
        else:
            yield field.name, value


def _copy(outline: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        getattr(outline, field.name).extend(value)
    elif field.message_type is not None:
        getattr(outline, field.name).CopyFrom(value)
    else:
        setattr(outline, field.name, value)


def _is_split(field: Any) -> bool:
    kind = field.message_type
    return kind is not None and kind.file.package != _WELL_KNOWN


_max_items = cache(max_items)


@cache
def _list_names(descriptor: Any) -> tuple[str, ...]:
    """Return the names of a message's fields that are lists of messages."""
    return tuple(
        field.name
        for field in descriptor.fields
        if field.is_repeated and field.message_type is not None
    )


def _count_messages(message: Any) -> int:
    """Count a message and the messages in its lists."""
    return 1 + sum(len(getattr(message, name)) for name in _list_names(message.DESCRIPTOR))


def _count_elements(message: Message) -> int:
    """Count the elements of the lists in a message, and stop beyond MAX_COUNTED_ELEMENTS."""
    count = 0
    for field, value in message.ListFields():
        is_struct = field.message_type is not None and field.message_type.full_name == STRUCT
        if is_struct or (field.message_type is None and not field.is_repeated):
            continue
        items = value if field.is_repeated else (value,)
        count += len(items)
        if field.message_type is not None:
            for item in items:
                if count > MAX_COUNTED_ELEMENTS:
                    break
                count += _count_elements(item)
    return count


def _named(violation: protovalidate.Violation, path: str) -> FieldViolation:
    proto = violation.proto
    for element in proto.field.elements if proto.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    if proto.rule_id == "string.not_contains":
        return FieldViolation(path, "must not contain NUL")
    return FieldViolation(path, proto.message or proto.rule_id)
