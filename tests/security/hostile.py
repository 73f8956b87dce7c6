"""Requests that nobody should send: valid ones bent out of shape, by field and by byte."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from hypothesis import strategies as st

INJECTIONS = (
    "'; DROP TABLE users; --",
    '" OR 1=1 --',
    "$1",
    "%s %d {0} {x}",
    "${jndi:ldap://127.0.0.1/a}",
    "../../../../etc/passwd",
    "<script>alert(1)</script>",
    "\\u0000",
    "\\",
    "'",
    "\r\nSet-Cookie: a=b",
    "\u202egnp.exe",
    "\ufeff",
    "Z̷̢̛͉͇a̶͝l̵̈́g̸̿o̴͐",
    "😀" * 50,
    "\x7f\x1b[31m",
    "NULL",
    "{}",
    "a" * 3000,
    "\u0130\u0131ß",
    "tsquery & ! ( | <-> :*",
)
DRIVER_WORDS = (
    "asyncpg",
    "sqlalchemy",
    "traceback",
    "syntax error",
    "relation ",
    "column ",
    "pg_",
    "psycopg",
    "violates",
)
"""What no answer may hold; none of it is in what is sent."""

_INTEGERS = (0, 1, -1, 2, 50, 1000, 1001, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1.0000001, 1e308, 5e-324, math.inf, -math.inf, math.nan)
_32_BIT = (
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_SINT32,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_ENUM,
)


def requests(kind: Descriptor, ids: Sequence[str]) -> st.SearchStrategy[Any]:
    """Make requests of a type, of which the ids are often those of things that are there."""
    return _messages(kind, ids, 4)


def _messages(kind: Descriptor, ids: Sequence[str], depth: int) -> st.SearchStrategy[Any]:
    if kind.full_name == "google.protobuf.Struct":
        return _structs
    fields = [field for field in kind.fields if depth > 0 or field.message_type is None]
    chosen = st.fixed_dictionaries(
        {}, optional={field.name: _field(field, ids, depth - 1) for field in fields}
    )
    return chosen.map(lambda values: _built(kind, values))


def _built(kind: Descriptor, values: dict[str, Any]) -> Message:
    message = GetMessageClass(kind)()
    for name, value in values.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


def _field(field: FieldDescriptor, ids: Sequence[str], depth: int) -> st.SearchStrategy[Any]:
    one = _one(field, ids, depth)
    return st.lists(one, max_size=4) if field.is_repeated else one


def _one(field: FieldDescriptor, ids: Sequence[str], depth: int) -> st.SearchStrategy[Any]:
    match field.type:
        case FieldDescriptor.TYPE_MESSAGE:
            assert field.message_type is not None
            return _messages(field.message_type, ids, depth)
        case FieldDescriptor.TYPE_STRING:
            texts = st.one_of(
                st.sampled_from(INJECTIONS),
                st.text(st.characters(codec="utf-8"), max_size=40),
                st.just(""),
            )
            if field.name.endswith("id") or "token" in field.name:
                return st.one_of(
                    st.sampled_from(ids), st.sampled_from(ids), st.uuids().map(str), texts
                )
            return texts
        case FieldDescriptor.TYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=40)
        case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
            return st.one_of(
                st.sampled_from(_FLOATS[:5]),
                st.sampled_from(_FLOATS).filter(lambda n: abs(n) < 1e38 or math.isnan(n)),
            )
        case _:
            if field.type in _32_BIT:
                return st.sampled_from([n for n in _INTEGERS if -(2**31) <= n < 2**31])
            return st.sampled_from(_INTEGERS)


def _nested(depth: int) -> Struct:
    struct = Struct()
    at = struct
    for _ in range(depth):
        at = at.fields["a"].struct_value
    at.fields["end"].string_value = "x"
    return struct


def _struct_of(value: Any) -> Struct:
    struct = Struct()
    struct.update(value)
    return struct


_structs = st.one_of(
    st.sampled_from([1, 10, 30]).map(_nested),
    st.dictionaries(
        st.one_of(st.sampled_from(INJECTIONS), st.text(st.characters(codec="utf-8"), max_size=5)),
        st.one_of(
            st.none(),
            st.booleans(),
            st.sampled_from(_FLOATS),
            st.sampled_from(INJECTIONS),
            st.lists(st.none(), max_size=3),
        ),
        max_size=4,
    ).map(_struct_of),
)


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Bend bytes of a request out of shape: once as a rule, so that what is bent is also looked at behind the first check."""
    for _ in range(chance.choice((1, 1, 1, 1, 2, 4))):
        data = chance.choice(_MUTATIONS)(data, other, chance)[:100_000]
    return data


def _flip(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def _insert(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    new = chance.choice(
        (
            chance.randbytes(chance.randint(1, 8)),
            b"\0",
            b"\xff" * 10,
            b"\xc3\x28",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
        )
    )
    return data[:at] + new + data[at:]


def _cut(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    return data[:start] + data[chance.randint(start, len(data)) :]


def _splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]


def _repeat(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    end = chance.randint(start, len(data))
    return data[:end] + data[start:end] * chance.randint(1, 200) + data[end:]


def _long(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    """Add a field of some number with a length that says anything."""
    tag = bytes([chance.randint(1, 20) << 3 & 0x78 | chance.randint(0, 7)])
    length = chance.choice(
        (b"\x00", b"\x7f", b"\xff\xff\xff\xff\x07", b"\xff" * 9 + b"\x01", b"\x80" * 12)
    )
    return data + tag + length + chance.randbytes(chance.randint(0, 5))


def _deep(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    """Add a message in a message in a message; every field number may be one."""
    inner = b""
    tag = bytes([chance.randint(1, 15) << 3 | 2])
    for _ in range(chance.choice((5, 50, 150))):
        size = len(inner)
        length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
        inner = tag + length + inner
    return data + inner


def _id(data: bytes, _other: bytes, chance: random.Random) -> bytes:
    """Put another id where one is."""
    at = data.find(b"-4")
    if at < 14:
        return data
    return data[: at - 13] + str(uuid.UUID(int=chance.getrandbits(128))).encode() + data[at + 23 :]


_MUTATIONS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    _flip, _flip, _flip, _insert, _insert, _cut, _splice, _repeat, _long, _deep, _id,
)  # fmt: skip
