"""Parsing of requests: limits that are checked before the parser runs, and slices."""

from __future__ import annotations

from typing import Any

import pytest
from chathistory.v1 import document_pb2, message_pb2
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidArgument, TooLarge
from service.rpc.convert_structs import MAX_VALUES
from service.rpc.request_parser import (
    LARGE_REQUEST_BYTES,
    MAX_REQUEST_BYTES,
    MAX_REQUEST_FIELDS,
    SLICE_BYTES,
    RequestParser,
    ScannedRequest,
)
from service.rpc.wire import MalformedWire, delimited, read_fields
from service.rpc.wire_limits import CHECKED_BYTES, STEP_FIELDS, check_message, max_items

ID = "0192d3a4-0000-7000-8000-000000000001"
APPEND = RequestParser(message_pb2.AppendMessagesRequest)
UPDATE = RequestParser(message_pb2.UpdateMessageRequest)
CHUNKS = RequestParser(document_pb2.AppendDocumentChunksRequest)
MIB = 1024 * 1024


class Pauses:
    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1


def nested_lists(depth: int) -> bytes:
    """Return the bytes of a Struct whose key `k` holds nested lists."""
    value = b""
    for _ in range(depth):
        value = delimited(6, delimited(1, value))  # Value.list_value, ListValue.values
    return delimited(1, delimited(1, b"k") + delimited(2, value))


def rejection(parser: RequestParser, data: bytes) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        parser.parse(data)
    return caught.value


def field_of(error: InvalidArgument) -> str:
    assert error.reason == "FIELD_VIOLATION"
    return error.violations[0].field


async def parse(parser: RequestParser, data: bytes) -> tuple[Any, int]:
    """Return a large request and the number of pauses in its parse."""
    scanned = parser.parse(data)
    assert isinstance(scanned, ScannedRequest)
    pauses = Pauses()
    return await scanned.parse(pauses), pauses.count


def test_small_request_is_parsed_immediately() -> None:
    request = message_pb2.AppendMessagesRequest(user_id=ID)
    request.messages.add(content="x" * (LARGE_REQUEST_BYTES - 100))
    assert APPEND.parse(request.SerializeToString()) == request


async def test_large_request_is_parsed_in_slices_with_a_pause_before_each() -> None:
    request = message_pb2.AppendMessagesRequest(user_id=ID, create_if_missing=True)
    for number in range(100):
        request.messages.add(content=f"{number} " + "x" * 40_000)
    data = request.SerializeToString()
    parsed, pause_count = await parse(APPEND, data)
    assert parsed == request
    assert len(data) // SLICE_BYTES <= pause_count <= len(data) // SLICE_BYTES + 3


async def test_slices_are_bounded_by_the_larger_of_slice_size_and_field() -> None:
    request = message_pb2.AppendMessagesRequest(user_id=ID)
    for size in (10, MIB - 100, 10, 300_000, 10, 10, SLICE_BYTES - 30, 10):
        request.messages.add(content="x" * size)
    scanned = APPEND.parse(request.SerializeToString())
    assert isinstance(scanned, ScannedRequest)
    ends = [end for _, end, _ in scanned._slices]
    assert [start for start, _, _ in scanned._slices] == [0, *ends[:-1]]
    fields = {(field.start, field.end) for field in read_fields(request.SerializeToString())}
    for start, end, _ in scanned._slices:
        assert end - start <= SLICE_BYTES or (start, end) in fields


def test_user_id_is_known_before_the_parse() -> None:
    request = message_pb2.AppendMessagesRequest(user_id=ID)
    request.messages.add(content="x" * LARGE_REQUEST_BYTES)
    assert APPEND.parse(request.SerializeToString()).user_id == ID


@pytest.mark.parametrize(
    ("parser", "number", "field"), [(APPEND, 3, "messages"), (CHUNKS, 4, "chunks")]
)
def test_too_many_elements_are_rejected_without_a_parse(
    parser: RequestParser, number: int, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "message_class", None)
    assert field_of(rejection(parser, delimited(number, b"") * MIB)) == field


def test_one_large_element_is_rejected_without_a_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    for parser in (APPEND, UPDATE):
        monkeypatch.setattr(parser, "message_class", None)
    large = delimited(5, b"x" * MIB)
    assert field_of(rejection(APPEND, delimited(3, b"") + delimited(3, large))) == "messages[1]"
    assert field_of(rejection(UPDATE, delimited(3, large))) == "message"


def test_chunks_are_limited_together() -> None:
    half = delimited(4, delimited(1, b"x" * (MIB // 2)))
    assert field_of(rejection(CHUNKS, half + half)) == "chunks"


def test_request_with_too_many_fields_is_malformed() -> None:
    unknown = b"\x98\x06\x01"  # Field 99, a number.
    data = unknown * (MAX_REQUEST_FIELDS + 1) + delimited(98, b"x" * LARGE_REQUEST_BYTES)
    assert rejection(APPEND, data).reason == "MALFORMED_REQUEST"


async def test_unknown_fields_of_a_large_request_are_ignored() -> None:
    data = b"\x98\x06\x01" + delimited(98, b"x" * MIB * 2) + delimited(1, ID.encode())
    parsed, _ = await parse(APPEND, data)
    assert parsed.user_id == ID


def test_repeated_singular_message_is_malformed() -> None:
    half = delimited(3, delimited(5, b"x" * LARGE_REQUEST_BYTES))
    assert rejection(UPDATE, half + half).reason == "MALFORMED_REQUEST"


def test_request_above_the_limit_is_too_large() -> None:
    with pytest.raises(TooLarge):
        APPEND.parse(bytes(MAX_REQUEST_BYTES + 1))


def test_deep_struct_behind_many_fields_is_not_searched_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The search parses each field alone: with 28,000 of them it would take 0.3 s."""
    attempts = 0

    class CountingAttempts:
        DESCRIPTOR = message_pb2.AppendMessagesRequest.DESCRIPTOR

        @staticmethod
        def FromString(data: bytes) -> message_pb2.AppendMessagesRequest:
            nonlocal attempts
            attempts += 1
            return message_pb2.AppendMessagesRequest.FromString(data)

    parser = RequestParser(message_pb2.AppendMessagesRequest)
    monkeypatch.setattr(parser, "message_class", CountingAttempts)
    message = delimited(6, b"") * 28_000 + delimited(7, nested_lists(300))
    error = rejection(parser, delimited(1, ID.encode()) + delimited(3, message))
    assert error.reason == "MALFORMED_REQUEST"
    assert attempts < 1_010


@pytest.mark.parametrize("padding_bytes", [5, LARGE_REQUEST_BYTES])
async def test_struct_nested_too_deeply_for_the_parser_is_named(padding_bytes: int) -> None:
    first = delimited(3, delimited(5, b"x" * padding_bytes))
    for depth in (60, 300, 20_000):
        struct = nested_lists(depth)
        part = delimited(6, delimited(1, b"text")) + delimited(6, delimited(6, struct))
        for message, path in (
            (delimited(7, struct), "messages[1].metadata"),
            (part, "messages[1].parts[1].data"),
        ):
            data = delimited(1, ID.encode()) + first + delimited(3, message)
            with pytest.raises(InvalidArgument) as caught:
                await parse(APPEND, data)
            assert field_of(caught.value) == path


def entries(count: int) -> bytes:
    """Return the bytes of a Struct with as many keys, each with a boolean."""
    return b"".join(
        delimited(1, delimited(1, f"{n}".encode()) + delimited(2, b"\x20\x01"))
        for n in range(count)
    )


def array(count: int, value: bytes) -> bytes:
    """Return the bytes of a Struct whose key `k` holds as many equal values."""
    values = delimited(1, value) * count
    return delimited(1, delimited(1, b"k") + delimited(2, delimited(6, values)))


LONG_STRUCTS = {
    "keys": entries(60_000),
    "empty keys": delimited(1, b"") * 400_000,
    "nulls": array(200_000, b"\x08\x00"),
    "empty values": array(400_000, b""),
    "strings": array(50_000, delimited(3, b"text of a value")),
    "empty objects": array(200_000, delimited(5, b"")),
    "one list many times": delimited(1, delimited(2, delimited(6, b"") * 400_000)),
    "unknown fields": b"\x98\x06\x01" * 200_000,
}


@pytest.mark.parametrize("kind", LONG_STRUCTS)
async def test_long_struct_is_rejected_without_a_parse(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    struct = LONG_STRUCTS[kind]
    assert CHECKED_BYTES < len(struct) < MIB - 100
    parsed: list[bytes] = []

    class Recorder:
        def MergeFromString(self, data: bytes) -> None:
            parsed.append(data)

    monkeypatch.setattr(APPEND, "message_class", Recorder)
    first = delimited(3, delimited(5, b"first"))
    for message, path in (
        (delimited(7, struct), "messages[1].metadata"),
        (delimited(6, b"") + delimited(6, delimited(6, struct)), "messages[1].parts[1].data"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await parse(APPEND, first + delimited(3, message))
        assert field_of(caught.value) == path
    assert all(len(data) < 100 for data in parsed)


async def test_too_many_parts_of_a_large_message_are_rejected() -> None:
    for parser, path in ((APPEND, "messages[0].parts"), (UPDATE, "message.parts")):
        with pytest.raises(InvalidArgument) as caught:
            await parse(parser, delimited(3, delimited(6, b"") * 200_000))
        assert field_of(caught.value) == path


async def test_struct_of_the_maximum_number_of_values_is_parsed() -> None:
    """Also if it has as many keys as possible, and its values are large."""
    value = delimited(3, b"x" * 20)
    for struct in (
        array(MAX_VALUES - 1, value),
        b"".join(
            delimited(1, delimited(1, b"%05d" % n) + delimited(2, value)) for n in range(MAX_VALUES)
        ),
    ):
        assert len(struct) > CHECKED_BYTES
        data = delimited(3, delimited(7, struct))
        parsed, _ = await parse(APPEND, data)
        assert parsed == message_pb2.AppendMessagesRequest.FromString(data)


async def test_check_of_a_long_struct_pauses() -> None:
    value = delimited(3, b"x" * 20)
    entry = delimited(1, delimited(1, b"key") + delimited(2, value))
    struct = entry * 9_000
    assert len(struct) > CHECKED_BYTES
    _, pause_count = await parse(APPEND, delimited(3, delimited(7, struct)))
    # Four fields for each entry: itself, its key, its value, and the text of that.
    assert pause_count == 1 + 9_000 * 4 // STEP_FIELDS


@given(st.binary(max_size=200))
def test_check_of_arbitrary_bytes_raises_nothing_else(data: bytes) -> None:
    for descriptor in (struct_pb2.Struct.DESCRIPTOR, message_pb2.Message.DESCRIPTOR):
        try:
            list(check_message(data, 0, len(data), descriptor, "message"))
        except (MalformedWire, InvalidArgument):
            continue


@given(st.binary(max_size=200))
def test_scan_of_arbitrary_bytes_raises_nothing_else(data: bytes) -> None:
    """A scan accepts at least what the parser accepts, groups excepted."""
    try:
        fields = list(read_fields(data))
    except MalformedWire:
        return
    assert [field.start for field in fields] == [0, *(field.end for field in fields)][: len(fields)]


@given(st.data())
async def test_scanned_request_equals_the_parsed_one(data: st.DataObject) -> None:
    request = message_pb2.AppendMessagesRequest(user_id=ID)
    for _ in range(data.draw(st.integers(0, 5))):
        request.messages.add(
            content=data.draw(st.text(max_size=20)), seq=data.draw(st.integers(0, 2**60))
        )
    serialized = request.SerializeToString()
    scanned = ScannedRequest(APPEND, serialized)
    assert await scanned.parse(Pauses()) == request
    assert scanned.user_id == ID


def test_every_list_of_messages_in_a_request_has_a_limit_for_the_scan() -> None:
    from service.rpc.servicer import DESCRIPTOR  # noqa: PLC0415

    for method in DESCRIPTOR.methods:
        for field in method.input_type.fields:
            if field.is_repeated and field.message_type is not None:
                assert max_items(field), field.full_name
