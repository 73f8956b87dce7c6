"""Validation: each limit from both sides, and every invalid field by its path."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from grpc import StatusCode, aio

from service.server import Server
from tests.support.chat import Chat, new_id, new_message
from tests.support.failures import (
    Failure,
    assert_fails,
    assert_field_violations,
    failure_of,
    read_failure,
)
from tests.support.servers import AsyncStub, channel

ID = "0192d3a4-0000-7000-8000-000000000001"


def full_user() -> dict[str, Any]:
    return {
        "id": ID,
        "external_id": "x",
        "email": "a@example.com",
        "name": "n",
        "metadata": {"k": ["v", {"kk": "vv"}]},
        "etag": "e",
    }


def full_session() -> dict[str, Any]:
    return {
        "id": ID,
        "user_id": ID,
        "title": "t",
        "summary": "s",
        "metadata": {"k": ["v", {"kk": "vv"}]},
        "etag": "e",
    }


def full_message() -> dict[str, Any]:
    parts = [
        {"text": "t"},
        {"tool_call": {"id": "i", "name": "n", "arguments": "a"}},
        {"tool_result": {"tool_call_id": "i", "content": "c"}},
        {"file": {"uri": "u", "mime_type": "m", "name": "n"}},
        {"citation": {"document_id": ID, "quote": "q"}},
        {"data": {"k": ["v", {"kk": "vv"}]}},
    ]
    return {
        "id": ID,
        "session_id": ID,
        "role": 2,
        "content": "c",
        "parts": parts,
        "metadata": {"k": ["v", {"kk": "vv"}]},
        "author": "a",
        "feedback": {"comment": "c"},
        "etag": "e",
    }


_KEYS = {"user_id": ID, "session_id": ID}
_MASK = {"paths": ["title"]}


def requests() -> dict[str, Message]:
    """Return a valid request of each method, with every field set."""
    created: dict[str, tuple[Any, dict[str, Any]]] = {
        "CreateUser": (user_pb2.CreateUserRequest, {"user": full_user()}),
        "GetUser": (user_pb2.GetUserRequest, {"user_id": ID}),
        "GetUser by email": (user_pb2.GetUserRequest, {"email": "a@example.com"}),
        "GetUser by external id": (user_pb2.GetUserRequest, {"external_id": "x"}),
        "ListUsers": (user_pb2.ListUsersRequest, {"page_size": 1}),
        "UpdateUser": (user_pb2.UpdateUserRequest, {"user_id": ID, "user": full_user()}),
        "DeleteUser": (user_pb2.DeleteUserRequest, {"user_id": ID}),
        "CreateSession": (
            session_pb2.CreateSessionRequest,
            {"user_id": ID, "session": full_session()},
        ),
        "GetSession": (session_pb2.GetSessionRequest, _KEYS),
        "ListSessions": (session_pb2.ListSessionsRequest, {"user_id": ID, "state": 1}),
        "UpdateSession": (
            session_pb2.UpdateSessionRequest,
            {"user_id": ID, "session": full_session()},
        ),
        "UpdateSession by mask": (
            session_pb2.UpdateSessionRequest,
            {"user_id": ID, "session": {"id": ID, "title": "t"}, "update_mask": _MASK},
        ),
        "DeleteSession": (session_pb2.DeleteSessionRequest, _KEYS),
        "ForkSession": (session_pb2.ForkSessionRequest, _KEYS | {"new_session_id": new_id()}),
        "AppendMessages": (
            message_pb2.AppendMessagesRequest,
            _KEYS
            | {"messages": [full_message()], "create_if_missing": True, "session": full_session()},
        ),
        "GetMessage": (message_pb2.GetMessageRequest, _KEYS | {"message_id": ID}),
        "ListMessages": (message_pb2.ListMessagesRequest, _KEYS | {"order": 2}),
        "UpdateMessage": (message_pb2.UpdateMessageRequest, _KEYS | {"message": full_message()}),
        "DeleteMessage": (message_pb2.DeleteMessageRequest, _KEYS | {"message_id": ID}),
        "GetContext": (message_pb2.GetContextRequest, _KEYS | {"max_messages": 1}),
        "WatchMessages": (message_pb2.WatchMessagesRequest, _KEYS),
    }
    return {name: kind(**fields) for name, (kind, fields) in created.items()}


def request_of(name: str) -> Message:
    return requests()[name]


async def call(stub: AsyncStub, name: str, request: Message) -> Any:
    """Call the method of a request."""
    started = getattr(stub, name.partition(" ")[0])(request)
    return await (anext(aiter(started)) if name == "WatchMessages" else started)


async def outcome(stub: AsyncStub, name: str, request: Message) -> Failure | None:
    """Return a call's failure, None if it succeeds."""
    try:
        await call(stub, name, request)
    except aio.AioRpcError as error:
        return read_failure(error)
    return None


# --- Paths: `messages[0].parts[1].text`, as the service writes them.


def strings_in(message: Message, prefix: str = "") -> Iterator[str]:
    """Yield the path of every string in a message; for strings in a Struct, the Struct's path."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        many = field.is_repeated
        if isinstance(value, Struct):
            yield path
        elif field.cpp_type == field.CPPTYPE_STRING:
            if not many:
                yield path
        elif field.cpp_type == field.CPPTYPE_MESSAGE:
            for n, item in enumerate(value if many else [value]):
                yield from strings_in(item, f"{path}[{n}]." if many else f"{path}.")


def put(request: Message, path: str, value: Any) -> Message:
    """Set the field at a path."""
    *parents, last = path.split(".")
    at: Any = request
    for step in parents:
        name, _, index = step.partition("[")
        at = getattr(at, name)
        if index:
            at = at[int(index.rstrip("]"))]
    if isinstance(value, dict):
        getattr(at, last).Clear()
        getattr(at, last).update(value)
    elif isinstance(value, list):
        del getattr(at, last)[:]
        getattr(at, last).extend(value)
    else:
        setattr(at, last, value)
    return request


def at_path(request: Message, path: str) -> Any:
    at: Any = request
    for step in path.split("."):
        name, _, index = step.partition("[")
        at = getattr(at, name)
        if index:
            at = at[int(index.rstrip("]"))]
    return at


@pytest.mark.parametrize("name", requests())
async def test_full_request_breaks_no_rule(stub: AsyncStub, name: str) -> None:
    failure = await outcome(stub, name, request_of(name))
    assert failure is None or failure.code in (StatusCode.NOT_FOUND, StatusCode.ABORTED), failure


@pytest.mark.case(n=2)
@pytest.mark.parametrize("name", requests())
async def test_nul_in_any_text_is_a_field_violation(stub: AsyncStub, name: str) -> None:
    for path in strings_in(request_of(name)):
        is_struct = isinstance(at_path(request_of(name), path), Struct)
        bad = (
            [{"a\0": 1}, {"a": "\0"}, {"a": [{"b": ["c\0"]}]}, {"a": {"b\0": None}}]
            if is_struct
            else ["\0", "a\0b"]
        )
        for value in bad:
            failure = await outcome(stub, name, put(request_of(name), path, value))
            assert failure is not None, f"{path} = {value!r} was accepted"
            assert (failure.reason, failure.fields) == ("FIELD_VIOLATION", [path])
            if not path.endswith("id") and "email" not in path:
                assert failure.descriptions == ["must not contain NUL"]


async def test_nul_in_a_mask_is_rejected(chat: Chat) -> None:
    session = await chat.create_session()
    await assert_field_violations(chat.update_session(("title\0",), id=session.id), "update_mask")


NOT_UUIDS = [
    "x",
    ID[:-1],
    ID + "0",
    ID.replace("-", ""),
    "{" + ID + "}",
    "urn:uuid:" + ID,
    ID.replace("0", "g", 1),
    " " + ID,
    ID + "\n",
    "'; DROP TABLE users; --",
    "../" + ID,
]


@pytest.mark.parametrize("name", requests())
async def test_id_must_be_a_uuid(stub: AsyncStub, name: str) -> None:
    ids = [path for path in strings_in(request_of(name)) if at_path(request_of(name), path) == ID]
    for path in ids:
        for bad in NOT_UUIDS:
            failure = await outcome(stub, name, put(request_of(name), path, bad))
            assert failure is not None, f"{path} = {bad!r} was accepted"
            assert (failure.reason, failure.fields) == ("FIELD_VIOLATION", [path])


REQUIRED = [
    ("CreateUser", "user"),
    ("UpdateUser", "user"),
    ("DeleteUser", "user_id"),
    ("GetSession", "session_id"),
    ("UpdateSession", "session"),
    ("DeleteSession", "session_id"),
    ("ForkSession", "session_id"),
    ("AppendMessages", "messages"),
    ("GetMessage", "session_id"),
    ("GetMessage", "message_id"),
    ("ListMessages", "session_id"),
    ("UpdateMessage", "message"),
    ("DeleteMessage", "session_id"),
    ("DeleteMessage", "message_id"),
    ("GetContext", "session_id"),
    ("WatchMessages", "session_id"),
]


@pytest.mark.parametrize(("name", "field"), REQUIRED)
async def test_missing_required_field_is_rejected(stub: AsyncStub, name: str, field: str) -> None:
    request = request_of(name)
    request.ClearField(field)
    await assert_field_violations(call(stub, name, request), field)


@pytest.mark.parametrize(
    "name", [name for name in requests() if "user_id" in requests()[name].DESCRIPTOR.fields_by_name]
)
async def test_service_must_set_user_id(stub: AsyncStub, name: str) -> None:
    request = request_of(name)
    request.ClearField("user_id")
    if name.startswith("GetUser"):
        request = user_pb2.GetUserRequest()
    if name == "UpdateUser":
        request = user_pb2.UpdateUserRequest(user=user_pb2.User(name="n"))
    await assert_field_violations(call(stub, name, request), "user_id")


# Path, maximum length, and whether bytes or characters count.
LENGTHS: list[tuple[str, str, int, str]] = [
    ("CreateUser", "user.external_id", 256, "characters"),
    ("CreateUser", "user.name", 256, "characters"),
    ("CreateUser", "user.etag", 64, "characters"),
    ("GetUser by external id", "external_id", 256, "characters"),
    ("GetUser by email", "email", 320, "characters"),
    ("CreateSession", "session.title", 512, "characters"),
    ("CreateSession", "session.summary", 64 * 1024, "bytes"),
    ("UpdateSession", "session.etag", 64, "characters"),
    ("AppendMessages", "messages[0].content", 256 * 1024, "bytes"),
    ("AppendMessages", "messages[0].author", 256, "characters"),
    ("AppendMessages", "messages[0].feedback.comment", 4096, "characters"),
    ("AppendMessages", "messages[0].parts[0].text", 256 * 1024, "bytes"),
    ("AppendMessages", "messages[0].parts[1].tool_call.id", 256, "characters"),
    ("AppendMessages", "messages[0].parts[1].tool_call.name", 256, "characters"),
    ("AppendMessages", "messages[0].parts[1].tool_call.arguments", 256 * 1024, "bytes"),
    ("AppendMessages", "messages[0].parts[2].tool_result.tool_call_id", 256, "characters"),
    ("AppendMessages", "messages[0].parts[2].tool_result.content", 256 * 1024, "bytes"),
    ("AppendMessages", "messages[0].parts[3].file.uri", 2048, "characters"),
    ("AppendMessages", "messages[0].parts[3].file.mime_type", 256, "characters"),
    ("AppendMessages", "messages[0].parts[3].file.name", 512, "characters"),
    ("AppendMessages", "messages[0].parts[4].citation.quote", 64 * 1024, "bytes"),
    ("AppendMessages", "session.title", 512, "characters"),
    ("UpdateMessage", "message.content", 256 * 1024, "bytes"),
]


@pytest.mark.parametrize(("name", "path", "longest", "unit"), LENGTHS, ids=str)
async def test_text_above_its_maximum_length_is_rejected(
    stub: AsyncStub, name: str, path: str, longest: int, unit: str
) -> None:
    letter = "語" if unit == "characters" else "é"
    count = longest // len(letter.encode()) if unit == "bytes" else longest
    for value, taken in (
        (letter * count, True),
        (letter * (count + 1), False),
        ("x" * (longest + 1), False),
    ):
        failure = await outcome(stub, name, put(request_of(name), path, value))
        if taken:
            assert failure is None or failure.reason != "FIELD_VIOLATION", failure
        else:
            assert failure is not None, f"{path} of {len(value)} was accepted"
            assert (failure.reason, failure.fields) == ("FIELD_VIOLATION", [path])


NUMBERS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("ListUsers", "page_size", [0, 1, 5000], [-1, -(2**31)]),
    ("ListSessions", "page_size", [0, 1, 5000], [-1]),
    ("ListSessions", "state", [0, 1, 2], [3, -1]),
    ("CreateSession", "session.state", [0, 1, 2], [3, -1]),
    ("UpdateSession", "session.summarized_through_seq", [0, 1], [-1, 2]),
    ("ListMessages", "page_size", [0, 1, 5000], [-1]),
    ("ListMessages", "order", [0, 1, 2], [3, -1]),
    ("AppendMessages", "messages[0].role", [1, 2, 3, 4], [0, 5, -1]),
    ("AppendMessages", "messages[0].token_count", [0, 2**31 - 1], [-1]),
    (
        "AppendMessages",
        "messages[0].feedback.score",
        [-1, 0, 1],
        [-1.01, 1.01, math.inf, -math.inf, math.nan],
    ),
    ("AppendMessages", "messages[0].parts[3].file.size_bytes", [0, 2**63 - 1], [-1]),
    ("AppendMessages", "messages[0].parts[4].citation.chunk_index", [0, 2**31 - 1], [-1]),
    ("AppendMessages", "expected_last_seq", [0], [-1]),
    ("UpdateMessage", "message.feedback.score", [-1, 1], [1.01, math.nan]),
    ("ForkSession", "through_seq", [0], [-1, 2**63 - 1]),
    ("GetContext", "max_messages", [0, 1, 1000], [-1, 1001]),
    ("GetContext", "max_tokens", [0, 1, 2**31 - 1], [-1]),
    ("WatchMessages", "after_seq", [0], [-1]),
]


@pytest.mark.parametrize(("name", "path", "good", "bad"), NUMBERS, ids=str)
async def test_number_outside_its_range_is_rejected(
    stub: AsyncStub, name: str, path: str, good: list[Any], bad: list[Any]
) -> None:
    chat = await Chat.of_new_user(stub)
    session_id = await chat.start([new_message("hello", id=ID)])
    await chat.create_session(id=ID)
    await chat.append(ID, [new_message("hello", id=ID)])
    for values, taken in ((good, True), (bad, False)):
        for value in values:
            request = put(request_of(name), path, value)
            if "user_id" in request.DESCRIPTOR.fields_by_name:
                put(request, "user_id", chat.user_id)
            for part in ("session", "message", "user"):
                if part in request.DESCRIPTOR.fields_by_name and request.HasField(part):
                    getattr(request, part).ClearField("etag")
                    if part == "session":
                        request.session.user_id = chat.user_id  # type: ignore[attr-defined]
            failure = await outcome(stub, name, request)
            refused = failure is not None and failure.reason == "FIELD_VIOLATION"
            assert refused is not taken, f"{path} = {value}: {failure}"
            if failure is not None and refused:
                assert failure.fields == [path]
    assert (await chat.get_session(session_id)).last_seq == 1


@pytest.mark.parametrize(
    "address",
    ["x", "a@", "@b", "a@b@c", "a b@c.example", "a@b..c", "a@-b.example", "<a@b.example>", "a@b\n"],
)
async def test_invalid_email_is_rejected(stub: AsyncStub, address: str) -> None:
    for name in ("CreateUser", "UpdateUser"):
        await assert_field_violations(
            call(stub, name, put(request_of(name), "user.email", address)), "user.email"
        )


async def test_unusual_email_is_accepted(stub: AsyncStub) -> None:
    for address in (
        "a+b.c@x.example",
        "x@localhost",
        "!#$%&'*+/=?^_`{|}~-@x.example",
        "a" * 64 + "@" + "b" * 60 + ".example",
    ):
        request = user_pb2.CreateUserRequest(user=user_pb2.User(email=address))
        assert (await stub.CreateUser(request)).user.email == address


# --- Structs.

STRUCTS = [
    ("CreateUser", "user.metadata"),
    ("UpdateUser", "user.metadata"),
    ("CreateSession", "session.metadata"),
    ("UpdateSession", "session.metadata"),
    ("AppendMessages", "messages[0].metadata"),
    ("AppendMessages", "session.metadata"),
    ("UpdateMessage", "message.metadata"),
]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *STRUCTS,
        ("AppendMessages", "messages[0].parts[5].data"),
        ("UpdateMessage", "message.parts[5].data"),
    ],
)
async def test_nan_and_infinity_in_a_struct_are_rejected(
    stub: AsyncStub, name: str, path: str
) -> None:
    for number in (math.nan, math.inf, -math.inf):
        for value in ({"n": number}, {"a": [1, {"b": [number]}]}):
            await assert_field_violations(
                call(stub, name, put(request_of(name), path, value)), path
            )


def of_size(size: int) -> Struct:
    """Return a Struct of exactly `size` bytes serialized."""
    struct_ = Struct()
    struct_["k"] = ""
    count = size - struct_.ByteSize()
    while struct_.ByteSize() != size:
        struct_["k"] = "x" * count
        count -= 1
    assert struct_.ByteSize() == size
    return struct_


@pytest.mark.parametrize(("name", "path"), STRUCTS)
async def test_metadata_above_16_kib_is_rejected(stub: AsyncStub, name: str, path: str) -> None:
    for size, taken in ((16 * 1024, True), (16 * 1024 + 1, False)):
        request = request_of(name)
        at_path(request, path).CopyFrom(of_size(size))
        failure = await outcome(stub, name, request)
        if taken:
            assert failure is None or failure.reason != "FIELD_VIOLATION", failure
        else:
            assert failure is not None
            assert (failure.reason, failure.fields) == ("FIELD_VIOLATION", [path])


async def test_unset_value_in_a_struct_is_null(chat: Chat) -> None:
    sent = new_message("x")
    sent.metadata.fields["k"].Clear()
    session_id = await chat.start([sent])
    assert (await chat.get(session_id, sent.id)).metadata["k"] is None


# --- Counts and sizes.


async def test_append_takes_1_to_100_messages(chat: Chat) -> None:
    session = await chat.create_session()
    await assert_field_violations(chat.append(session.id, []), "messages")
    await assert_field_violations(
        chat.append(session.id, [new_message("x") for _ in range(101)]), "messages"
    )
    assert (
        len((await chat.append(session.id, [new_message("x") for _ in range(100)])).messages) == 100
    )


async def test_message_takes_64_parts_with_a_kind(chat: Chat) -> None:
    session = await chat.create_session()
    part = {"text": "p"}
    await chat.append(session.id, [new_message("x", parts=[part] * 64)])
    await assert_field_violations(
        chat.append(session.id, [new_message("x", parts=[part] * 65)]), "messages[0].parts"
    )
    failure = await assert_field_violations(
        chat.append(session.id, [new_message("x", parts=[part, {}])]), "messages[0].parts[1].kind"
    )
    assert failure.descriptions
    for name, field in (("tool_call", "id"), ("tool_result", "tool_call_id")):
        await assert_field_violations(
            chat.append(session.id, [new_message("x", parts=[{name: {}}])]),
            f"messages[0].parts[0].{name}.{field}",
        )


def mebibyte(over: int = 0) -> message_pb2.Message:
    """Return a message of one MiB plus `over` bytes serialized."""
    quarter = "x" * (256 * 1024)
    message = new_message(quarter, parts=[{"text": quarter}, {"text": quarter}, {"text": ""}])
    message.parts[2].text = "x" * (1024 * 1024 - message.ByteSize() + over)
    message.parts[2].text = message.parts[2].text[message.ByteSize() - 1024 * 1024 - over :]
    assert message.ByteSize() == 1024 * 1024 + over
    return message


async def test_message_of_one_mebibyte_is_stored(chat: Chat) -> None:
    session_id = await chat.start([sent := mebibyte()])
    got = await chat.get(session_id, sent.id)
    assert (got.content, list(got.parts)) == (sent.content, list(sent.parts))
    assert len((await chat.context(session_id)).messages) == 1
    await assert_field_violations(
        chat.append(session_id, [new_message("x"), mebibyte(1)]), "messages[1]"
    )
    too_much = [{"text": "x" * 262144}] * 4
    await assert_field_violations(chat.update(session_id, sent.id, parts=too_much), "message")
    assert (await chat.get_session(session_id)).last_seq == 1


async def test_request_above_4_mib_is_rejected_and_the_next_call_served(chat: Chat) -> None:
    session_id = await chat.start()
    with pytest.raises(aio.AioRpcError) as caught:
        await chat.append(session_id, [mebibyte() for _ in range(4)])
    assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
    assert len((await chat.append(session_id, [mebibyte() for _ in range(3)])).messages) == 3


# --- Several violations.


async def test_every_invalid_field_has_one_violation(stub: AsyncStub) -> None:
    request = request_of("AppendMessages")
    for path, value in (
        ("user_id", "x"),
        ("messages[0].content", "a\0"),
        ("messages[0].feedback.score", 2),
        ("session.title", "\0"),
    ):
        put(request, path, value)
    failure = await assert_fails(call(stub, "AppendMessages", request), "FIELD_VIOLATION")
    assert sorted(failure.fields) == [
        "messages[0].content",
        "messages[0].feedback.score",
        "session.title",
        "user_id",
    ]
    assert re.fullmatch(r"user_id: .* \(and 3 more\)", failure.message)


async def test_field_that_breaks_two_rules_has_one_violation(stub: AsyncStub) -> None:
    request = put(request_of("AppendMessages"), "messages[0].content", "\0" * (256 * 1024 + 1))
    await assert_field_violations(call(stub, "AppendMessages", request), "messages[0].content")


async def test_violations_are_limited_to_20(chat: Chat) -> None:
    failure = await failure_of(
        chat.append(new_id(), [new_message("a\0", author="\0") for _ in range(100)])
    )
    assert failure.reason == "FIELD_VIOLATION"
    assert len(failure.fields) == 20


# --- Malformed bytes.


def nested(depth: int) -> bytes:
    """Return an AppendMessagesRequest whose metadata is nested `depth` levels."""

    def field(number: int, data: bytes) -> bytes:
        length = len(data)
        varint = b""
        while length > 0x7F:
            varint += bytes([length & 0x7F | 0x80])
            length >>= 7
        return bytes([number << 3 | 2]) + varint + bytes([length]) + data

    value = b""
    for _ in range(depth):
        value = field(6, field(1, value))  # Value.list_value, ListValue.values
    struct = field(1, field(1, b"k") + field(2, value))
    return field(1, ID.encode()) + field(3, field(7, struct))


MALFORMED = {
    "no message": b"\xff\xff\xff",
    "cut short": b"\x0a\x24" + ID.encode()[:20],
    "wrong UTF-8": b"\x0a\x04\xff\xfe\xfd\xfc",
    "lone surrogate": b"\x0a\x03\xed\xa0\x80",
    "group without end": b"\x0b",
}


def call_raw(opened: aio.Channel, name: str, data: bytes) -> Any:
    """Call a method with these bytes, and return the reply's bytes."""
    method: Any = opened.unary_stream if name == "WatchMessages" else opened.unary_unary
    started = method(f"/chathistory.v1.ChatHistoryService/{name}")(data)
    return anext(aiter(started)) if name == "WatchMessages" else started


@pytest.mark.parametrize("name", ["AppendMessages", "GetSession", "WatchMessages"])
async def test_malformed_bytes_are_rejected_and_the_next_call_served(
    server: Server, name: str
) -> None:
    async with channel(server.address) as opened:
        for kind, data in MALFORMED.items():
            failure = await failure_of(call_raw(opened, name, data))
            assert (failure.reason, failure.fields) == ("MALFORMED_REQUEST", []), kind
        reply = await call_raw(opened, "ListUsers", b"")
        assert user_pb2.ListUsersResponse.FromString(reply).next_page_token == ""


async def test_struct_nested_too_deeply_is_rejected(server: Server) -> None:
    async with channel(server.address) as opened:
        for depth in (60, 300, 20_000):
            await assert_field_violations(
                call_raw(opened, "AppendMessages", nested(depth)), "messages[0].metadata"
            )


async def test_unknown_fields_are_ignored(server: Server, chat: Chat) -> None:
    request = session_pb2.CreateSessionRequest(
        user_id=chat.user_id, session=session_pb2.Session(title="t")
    )
    unknown = b"\xfa\x7f\x03new"  # Field 2047, a string.
    async with channel(server.address) as opened:
        reply = await call_raw(opened, "CreateSession", request.SerializeToString() + unknown)
    assert session_pb2.CreateSessionResponse.FromString(reply).session.title == "t"


async def test_numbers_in_a_struct_are_stored(chat: Chat) -> None:
    numbers = [0.1, -1.5, 1e308, -1e308, 5e-324, float(2**53), 1 / 3, -0.0]
    sent = new_message("x", metadata={"n": numbers}, parts=[{"data": {"n": numbers}}])
    session_id = await chat.start([sent])
    got = await chat.get(session_id, sent.id)
    for struct in (got.metadata, got.parts[0].data):
        # -0.0 is stored as 0.0, which is equal.
        assert [value.number_value for value in struct.fields["n"].list_value.values] == numbers
