"""The matrix of RPC, field and size: a valid request of every RPC, one field of which is replaced.

The fields and their limits are read from the descriptors and their protovalidate rules, so a new
field is part of the matrix without an entry here. A new RPC needs an entry in `BASE_REQUESTS`.
"""

from __future__ import annotations

import random
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from buf.validate import validate_pb2
from chathistory.v1 import (
    document_pb2,
    export_pb2,
    message_pb2,
    search_pb2,
    session_pb2,
    user_pb2,
)
from chathistory.v1.chat_history_service_pb2 import DESCRIPTOR
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from benchmarks.hostile.account import Account

SERVICE = DESCRIPTOR.services_by_name["ChatHistoryService"]
STREAMS = frozenset(method.name for method in SERVICE.methods if method.server_streaming)
SERVICE_ONLY = frozenset({"CreateUser", "ListUsers", "DeleteUser", "RebuildSearchIndex"})
SIZES = ("0", "1", "limit-1", "limit", "limit+1", "10x")
SHAPES = ("many small", "few big")
"""How the elements of a repeated field are filled."""
TEXTS = {
    "ascii": "a",
    "emoji": "😀",
    "combining": "e\u0301",
    "words": '-x or "y" ',
    "escapes": '&<\\"',
}
"""Units of which texts consist. One emoji makes Python store a text with 4 bytes a character."""
MAX_BYTES = 12 * 1024 * 1024
"""Limit of a value; requests over 4 MiB are rejected in any case."""
_REQUEST_BYTES = 3_900_000
"""Size of a request just below the service's limit."""
_DEFAULT_LIMITS = {"paths": 20, "metadata": 16 * 1024, "data": 1024 * 1024, "arguments": 262_144}
"""Limits that no protovalidate rule states."""
_DEFAULT_LIMIT = 1024
_MAX_DEPTH = 6

_New = Callable[[Account], Message]


def _id() -> str:
    return str(uuid.uuid4())


BASE_REQUESTS: dict[str, _New] = {
    "CreateUser": lambda _: user_pb2.CreateUserRequest(user=user_pb2.User(id=_id())),
    "GetUser": lambda a: user_pb2.GetUserRequest(user_id=a.user_id),
    "ListUsers": lambda _: user_pb2.ListUsersRequest(page_size=1000),
    "UpdateUser": lambda a: user_pb2.UpdateUserRequest(
        user_id=a.user_id, user=user_pb2.User(name="name")
    ),
    # A user that does not exist: the attacker's own data serve all attacks.
    "DeleteUser": lambda _: user_pb2.DeleteUserRequest(user_id=_id(), allow_missing=True),
    "ExportUserData": lambda a: export_pb2.ExportUserDataRequest(user_id=a.user_id),
    "CreateSession": lambda a: session_pb2.CreateSessionRequest(user_id=a.user_id),
    "GetSession": lambda a: session_pb2.GetSessionRequest(
        user_id=a.user_id, session_id=a.sessions["short"]
    ),
    "ListSessions": lambda a: session_pb2.ListSessionsRequest(user_id=a.user_id, page_size=1000),
    "UpdateSession": lambda a: session_pb2.UpdateSessionRequest(
        user_id=a.user_id, session=session_pb2.Session(id=a.sessions["scratch"], title="title")
    ),
    "DeleteSession": lambda a: session_pb2.DeleteSessionRequest(
        user_id=a.user_id, session_id=_id(), allow_missing=True
    ),
    "ForkSession": lambda a: session_pb2.ForkSessionRequest(
        user_id=a.user_id, session_id=a.sessions["short"], through_seq=10
    ),
    "AppendMessages": lambda a: message_pb2.AppendMessagesRequest(
        user_id=a.user_id,
        session_id=a.sessions["scratch"],
        messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content="hello")],
    ),
    "GetMessage": lambda a: message_pb2.GetMessageRequest(
        user_id=a.user_id, session_id=a.sessions["short"], message_id=a.message_id
    ),
    "ListMessages": lambda a: message_pb2.ListMessagesRequest(
        user_id=a.user_id, session_id=a.sessions["long"], page_size=1000
    ),
    "UpdateMessage": lambda a: message_pb2.UpdateMessageRequest(
        user_id=a.user_id,
        session_id=a.sessions["short"],
        message=message_pb2.Message(id=a.message_id, content="changed"),
    ),
    "DeleteMessage": lambda a: message_pb2.DeleteMessageRequest(
        user_id=a.user_id, session_id=a.sessions["short"], message_id=_id(), allow_missing=True
    ),
    "GetContext": lambda a: message_pb2.GetContextRequest(
        user_id=a.user_id, session_id=a.sessions["long"], max_messages=1000
    ),
    "WatchMessages": lambda a: message_pb2.WatchMessagesRequest(
        user_id=a.user_id, session_id=a.sessions["long"]
    ),
    "SearchMessages": lambda a: message_pb2.SearchMessagesRequest(
        user_id=a.user_id, query="hello world", limit=100
    ),
    "CreateDocument": lambda a: document_pb2.CreateDocumentRequest(
        user_id=a.user_id,
        document=document_pb2.Document(title="title"),
        chunks=[document_pb2.DocumentChunk(text="text")],
    ),
    "AppendDocumentChunks": lambda a: document_pb2.AppendDocumentChunksRequest(
        user_id=a.user_id,
        document_id=a.document_id,
        first_index=0,
        chunks=[document_pb2.DocumentChunk(text="text")],
    ),
    "GetDocument": lambda a: document_pb2.GetDocumentRequest(
        user_id=a.user_id, document_id=a.document_id
    ),
    "ListDocuments": lambda a: document_pb2.ListDocumentsRequest(user_id=a.user_id, page_size=1000),
    "UpdateDocument": lambda a: document_pb2.UpdateDocumentRequest(
        user_id=a.user_id, document=document_pb2.Document(id=a.document_id, title="title")
    ),
    "DeleteDocument": lambda a: document_pb2.DeleteDocumentRequest(
        user_id=a.user_id, document_id=_id(), allow_missing=True
    ),
    "ListDocumentChunks": lambda a: document_pb2.ListDocumentChunksRequest(
        user_id=a.user_id, document_id=a.document_id, page_size=1000
    ),
    "SearchDocuments": lambda a: document_pb2.SearchDocumentsRequest(
        user_id=a.user_id, query="hello world", limit=100
    ),
    "RebuildSearchIndex": lambda _: search_pb2.RebuildSearchIndexRequest(),
}


class Field(NamedTuple):
    """A field of a request, by the names that lead to it."""

    rpc: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.rpc}.{'.'.join(self.path)}"


def fields(rpc: str) -> list[Field]:
    """Return the fields of an RPC's request that hold texts, bytes, objects or many elements."""
    kind = SERVICE.methods_by_name[rpc].input_type
    return [Field(rpc, path) for path in _paths(kind, ())]


def _paths(kind: Descriptor, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for field in kind.fields:
        here = (*path, field.name)
        if field.is_repeated or field.type in (
            FieldDescriptor.TYPE_STRING,
            FieldDescriptor.TYPE_BYTES,
        ):
            yield here
        if field.message_type is None:
            continue
        if field.message_type.full_name == Struct.DESCRIPTOR.full_name:
            if not field.is_repeated:
                yield here
        elif len(here) < _MAX_DEPTH:
            yield from _paths(field.message_type, here)


def request(
    field: Field, account: Account, *, size: str, text: str, shape: str, chance: random.Random
) -> bytes:
    """Return the request of `message_of`, serialised."""
    message: Message = message_of(field, account, size=size, text=text, shape=shape, chance=chance)
    return message.SerializeToString()


def message_of(
    field: Field, account: Account, *, size: str, text: str, shape: str, chance: random.Random
) -> Any:
    """Return a request, valid but for one field of the given size.

    Args:
        field: The field to replace.
        account: The caller, whose data the request names.
        size: One of `SIZES`.
        text: A name in `TEXTS`.
        shape: One of `SHAPES`.
        chance: Draws the content of objects.
    """
    whole = BASE_REQUESTS[field.rpc](account)
    if not field.path:
        return whole
    at: Any = whole
    for name in field.path[:-1]:
        child = getattr(at, name)
        if at.DESCRIPTOR.fields_by_name[name].is_repeated:
            at = child[0] if child else child.add()
        else:
            child.SetInParent()
            at = child
    name = field.path[-1]
    descriptor = at.DESCRIPTOR.fields_by_name[name]
    count = _count(size, limit(descriptor))
    at.ClearField(name)
    if descriptor.is_repeated:
        _fill_repeated(at, descriptor, count, shape)
    elif descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(at, name).CopyFrom(new_struct(chance.choice(STRUCTS), count))
    elif descriptor.type == FieldDescriptor.TYPE_BYTES:
        setattr(at, name, bytes(count))
    else:
        unit = TEXTS[text]
        setattr(at, name, (unit * (count // len(unit) + 1))[:count])
    return whole


def limit(field: FieldDescriptor) -> int:
    """Return a field's limit by its protovalidate rule: characters, bytes or elements."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if field.is_repeated:
        if rules.repeated.max_items:
            return int(rules.repeated.max_items)
    elif rules.string.uuid:
        return 36
    elif value := rules.string.max_len or rules.string.max_bytes or rules.bytes.max_len:
        return int(value)
    return _DEFAULT_LIMITS.get(field.name, _DEFAULT_LIMIT)


def _count(size: str, at_most: int) -> int:
    counts = {
        "0": 0,
        "1": 1,
        "limit-1": at_most - 1,
        "limit": at_most,
        "limit+1": at_most + 1,
        "10x": 10 * at_most,
    }
    return min(counts[size], MAX_BYTES)


def _fill_repeated(parent: Any, field: FieldDescriptor, count: int, shape: str) -> None:
    values = getattr(parent, field.name)
    if field.type == FieldDescriptor.TYPE_STRING:
        if field.name.endswith("ids"):
            values.extend(_id() for _ in range(count))
        else:
            width = 8 if shape == "many small" else 4096
            values.extend(f"{index:0{width}}" for index in range(min(count, MAX_BYTES // width)))
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        values.extend([0.5] * min(count, MAX_BYTES // 4))
    elif isinstance(parent, Struct) or (
        field.message_type is not None and field.message_type.GetOptions().map_entry
    ):
        parent.MergeFrom(new_struct("wide", count))
    else:
        content_bytes = 1 if shape == "many small" else _REQUEST_BYTES // max(count, 1) - 64
        for _ in range(count):
            _fill_element(values.add(), max(1, min(content_bytes, 262_144)))


def _fill_element(element: Any, content_bytes: int) -> None:
    """Fill the largest text of an element, and what its rules require."""
    names = element.DESCRIPTOR.fields_by_name
    for name in ("content", "text"):
        if name in names:
            setattr(element, name, "a" * content_bytes)
            break
    if "role" in names:
        element.role = message_pb2.ROLE_USER


def new_struct(shape: str, size_bytes: int) -> Struct:
    """Return an object of about the given serialised size."""
    struct = Struct()
    _FILL[shape](struct, size_bytes)
    return struct


def _nulls(struct: Struct, size_bytes: int) -> None:
    values = struct.fields["a"].list_value.values
    for _ in range(size_bytes // 4):
        values.add().null_value = struct_pb2.NULL_VALUE


def _numbers(struct: Struct, size_bytes: int) -> None:
    values = struct.fields["a"].list_value.values
    for _ in range(size_bytes // 11):
        values.add().number_value = -sys.float_info.max


def _nested(struct: Struct, size_bytes: int) -> None:
    at = struct
    # protobuf itself rejects more than 100 levels of messages.
    for _ in range(min(size_bytes // 8, 30)):
        at = at.fields["a"].struct_value
    at.fields["a"].string_value = "x" * max(size_bytes - 300, 0)


def _wide(struct: Struct, size_bytes: int) -> None:
    for index in range(size_bytes // 14 or min(size_bytes, 1)):
        struct.fields[f"{index:x}"].bool_value = True


def _text(struct: Struct, size_bytes: int) -> None:
    struct.fields["a"].string_value = "a" * size_bytes


def _emoji(struct: Struct, size_bytes: int) -> None:
    struct.fields["a"].string_value = "😀" * (size_bytes // 4)


_FILL = {
    "nulls": _nulls,
    "numbers": _numbers,
    "nested": _nested,
    "wide": _wide,
    "texts": _text,
    "emoji": _emoji,
}
STRUCTS = tuple(_FILL)
"""Shapes of objects: nulls, numbers that JSON writes with 309 digits, depth, keys, long texts."""
