"""Conversions between rows and the generated code: users, sessions and messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from chathistory.v1 import message_pb2, session_pb2, user_pb2
from google.protobuf.message import Message as ProtoMessage

from service.errors import InvalidArgument
from service.rpc.convert_structs import StructReader, count_digits, dump_json, metadata_json
from service.store.append.request import NewMessage, NewSession
from service.store.rows import MessageRow, SessionRow, UserRow
from service.store.token_estimate import estimate_tokens

MAX_MESSAGE_BYTES = 1024 * 1024
FINGERPRINT_BYTES = 16

_OVERHEAD_BYTES = 192
"""Size of a message's output-only fields in a reply: ids, seq, times and etag."""
_US_PER_S = 1_000_000
_MESSAGE_OUTPUT_ONLY = ("session_id", "seq", "create_time", "update_time", "etag")
_SESSION_OUTPUT_ONLY = (
    "user_id",
    "last_seq",
    "message_count",
    "create_time",
    "update_time",
    "etag",
    "forked_from",
)
_USER_OUTPUT_ONLY = ("create_time", "update_time", "etag")


def timestamp(us: int) -> Any:
    """Return the initial value of a Timestamp field for microseconds since 1970."""
    return {"seconds": us // _US_PER_S, "nanos": us % _US_PER_S * 1000}


def canonical_fingerprint(message: ProtoMessage, output_only: Iterable[str], id_: str) -> bytes:
    """Return the fingerprint of a resource, whose output-only fields are cleared and id is set."""
    for name in output_only:
        message.ClearField(name)
    if message.id != id_:  # type: ignore[attr-defined]
        message.id = id_  # type: ignore[attr-defined]
    return hashlib.blake2b(
        message.SerializeToString(deterministic=True), digest_size=FINGERPRINT_BYTES
    ).digest()


def fork_fingerprint(session_id: str, through_seq: int) -> bytes:
    """Return the fingerprint of a session that a fork creates."""
    return hashlib.blake2b(
        f"fork {session_id} {through_seq}".encode(), digest_size=FINGERPRINT_BYTES
    ).digest()


def user(row: UserRow) -> user_pb2.User:
    """Return the resource of a row."""
    return user_pb2.User(
        id=row.id,
        external_id=row.external_id or "",
        email=row.email or "",
        name=row.name,
        metadata=parse_json(row.metadata),
        create_time=timestamp(row.created_us),
        update_time=timestamp(row.updated_us),
        etag=row.etag,
    )


def session(row: SessionRow) -> session_pb2.Session:
    """Return the resource of a row."""
    return session_pb2.Session(
        id=row.id,
        user_id=row.user_id,
        title=row.title,
        summary=row.summary,
        summarized_through_seq=row.summarized_through_seq,
        metadata=parse_json(row.metadata),
        state=row.state,  # type: ignore[arg-type]
        last_seq=row.last_seq,
        message_count=row.message_count,
        create_time=timestamp(row.created_us),
        update_time=timestamp(row.updated_us),
        etag=row.etag,
        forked_from=_forked_from(row),
    )


def _forked_from(row: SessionRow) -> session_pb2.ForkedFrom | None:
    if row.forked_from_id is None:
        return None
    return session_pb2.ForkedFrom(session_id=row.forked_from_id, seq=row.forked_from_seq or 0)


def message(
    row: MessageRow,
    session_id: str,
    create: Callable[..., message_pb2.Message] = message_pb2.Message,
) -> message_pb2.Message:
    """Return the resource of a row.

    Args:
        row: The row.
        session_id: The session of the message.
        create: Creates the empty message; the `add` of a reply's list avoids a copy.
    """
    # Fields are assigned in place: keyword arguments of the constructor cost more, and a Timestamp
    # passed to it would be created, copied and discarded.
    resource = create()
    resource.id = row.id
    resource.session_id = session_id
    resource.seq = row.seq
    resource.role = row.role  # type: ignore[assignment]
    resource.content = row.content
    resource.etag = row.etag
    time = resource.create_time
    time.seconds, time.nanos = row.created_us // _US_PER_S, row.created_us % _US_PER_S * 1000
    time = resource.update_time
    time.seconds, time.nanos = row.updated_us // _US_PER_S, row.updated_us % _US_PER_S * 1000
    if row.token_count is not None:
        resource.token_count = row.token_count
    if row.author:
        resource.author = row.author
    if row.parts is not None:
        for part in json.loads(row.parts):
            resource.parts.add(**part)
    if row.metadata is not None:
        resource.metadata.update(json.loads(row.metadata))
    if row.feedback_score is not None:
        resource.feedback.score = row.feedback_score
        resource.feedback.comment = row.feedback_comment or ""
    return resource


def stored_size(
    resource: message_pb2.Message, parts: str | None, metadata: str | None, *, is_checked: bool
) -> int:
    """Return the approximate size of an updated message in a reply, in bytes.

    It is that of its append: the output-only fields, which are cleared, count as a constant.

    Args:
        resource: The message.
        parts: Its parts as JSON.
        metadata: Its metadata as JSON.
        is_checked: Whether to check that it is not larger than one that can be appended.

    Raises:
        InvalidArgument: it is.
    """
    for name in _MESSAGE_OUTPUT_ONLY:
        resource.ClearField(name)  # type: ignore[arg-type]
    if is_checked and resource.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument.field(
            "message",
            f"must be at most {MAX_MESSAGE_BYTES} bytes, with the stored fields counted that the "
            "request does not change",
        )
    return resource.ByteSize() + _OVERHEAD_BYTES + count_digits(parts) + count_digits(metadata)


def parse_json(text: str | None) -> Any:
    """Return the value of a JSON text, for a Struct field or a jsonb column; None for None."""
    return None if text is None else json.loads(text)


def new_message(
    message: message_pb2.Message, id_: str, field: str, reader: StructReader | None = None
) -> NewMessage:
    """Return a message to append.

    Args:
        message: The message of the request.
        id_: Its id.
        field: Its path in the request.
        reader: Counts the values of the whole request.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    if not message.role:
        raise InvalidArgument.field(f"{field}.role", "is required")
    if message.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument.field(field, f"must be at most {MAX_MESSAGE_BYTES} bytes")
    content = message.content
    parts = metadata = None
    digit_count = 0
    if message.parts or message.HasField("metadata"):
        reader = reader or StructReader()
        reader.start_message()
        parts = parts_json(message.parts, f"{field}.parts", reader)
        metadata = metadata_json(message.metadata, f"{field}.metadata", reader)
        digit_count = reader.digit_count
    # The Structs come first, because the fingerprint sorts their keys, of which they limit the
    # number.
    fingerprint = canonical_fingerprint(message, _MESSAGE_OUTPUT_ONLY, id_)
    feedback = message.feedback if message.HasField("feedback") else None
    return NewMessage(
        id_,
        message.role,
        content,
        parts,
        metadata,
        message.token_count if message.HasField("token_count") else None,
        estimate_tokens(content, parts),
        message.ByteSize() + _OVERHEAD_BYTES + digit_count,
        message.author,
        feedback.score if feedback else None,
        feedback.comment if feedback else None,
        fingerprint,
    )


def parts_json(parts: Iterable[message_pb2.Part], field: str, reader: StructReader) -> str | None:
    """Return parts as JSON, a list of objects like {"text": …}; None if there are none.

    Raises:
        InvalidArgument: a Struct in them cannot be stored.
    """
    objects = [_part_object(part, f"{field}[{index}]", reader) for index, part in enumerate(parts)]
    return dump_json(objects) if objects else None


def _part_object(part: message_pb2.Part, field: str, reader: StructReader) -> dict[str, Any]:
    kind = part.WhichOneof("kind")
    if kind is None or kind == "text":
        return {"text": part.text}
    if kind == "data":
        return {"data": reader.read(part.data, f"{field}.data")}
    # The other kinds have scalar fields only, stored under the names of the protos. A call's `id`
    # and a result's `tool_call_id` are required, so that store/context.py finds them.
    return {
        kind: {descriptor.name: value for descriptor, value in getattr(part, kind).ListFields()}
    }


def user_values(user: user_pb2.User, id_: str) -> dict[str, Any]:
    """Return the columns of a user to create.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    # Before the fingerprint, which sorts the keys of the metadata: this checks its size.
    values = user_changes(user, ("external_id", "email", "name", "metadata"))
    return values | {
        "id": id_,
        "fingerprint": canonical_fingerprint(user, _USER_OUTPUT_ONLY, id_),
    }


def user_changes(user: user_pb2.User, paths: Iterable[str]) -> dict[str, Any]:
    """Return the columns of the given fields of a user; an empty unique field becomes NULL.

    Raises:
        InvalidArgument: as `user_values`.
    """
    return {path: _user_value(user, path) for path in paths}


def _user_value(user: user_pb2.User, path: str) -> Any:
    match path:
        case "metadata":
            return parse_json(metadata_json(user.metadata, "user.metadata"))
        case "external_id" | "email":
            return getattr(user, path) or None
        case _:
            return getattr(user, path)


def session_values(session: session_pb2.Session, id_: str) -> dict[str, Any]:
    """Return the columns of a session to create.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    if session.summarized_through_seq:
        raise InvalidArgument.field(
            "session.summarized_through_seq", "must be 0: a new session has no messages"
        )
    paths = (
        ("title", "summary", "metadata", "state")
        if session.state
        else ("title", "summary", "metadata")
    )
    # Before the fingerprint, which sorts the keys of the metadata: this checks its size.
    values = session_changes(session, paths)
    return values | {
        "id": id_,
        "fingerprint": canonical_fingerprint(session, _SESSION_OUTPUT_ONLY, id_),
    }


def new_session(session: session_pb2.Session, session_id: str) -> NewSession:
    """Convert the session that an append may create.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    if session.state == session_pb2.SESSION_STATE_ARCHIVED:
        raise InvalidArgument.field(
            "session.state", "must not be ARCHIVED: the session gets messages now"
        )
    values = session_values(session, session_id)
    metadata = metadata_json(session.metadata, "session.metadata")
    return NewSession(values["title"], values["summary"], metadata, values["fingerprint"])


def session_changes(session: session_pb2.Session, paths: Iterable[str]) -> dict[str, Any]:
    """Return the columns of the given fields of a session.

    Raises:
        InvalidArgument: as `session_values`.
    """
    values = {path: getattr(session, path) for path in paths}
    if "metadata" in values:
        values["metadata"] = parse_json(metadata_json(session.metadata, "session.metadata"))
    if values.get("state") == session_pb2.SESSION_STATE_UNSPECIFIED:
        raise InvalidArgument.field(
            "session.state", "must be SESSION_STATE_ACTIVE or SESSION_STATE_ARCHIVED"
        )
    return values


def message_changes(message: message_pb2.Message, paths: Iterable[str]) -> dict[str, Any]:
    """Return the columns of the given fields of a message; `feedback` has two.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    if message.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument.field("message", f"must be at most {MAX_MESSAGE_BYTES} bytes")
    values: dict[str, Any] = {}
    reader = StructReader()
    for path in paths:
        match path:
            case "parts":
                values["parts"] = parts_json(message.parts, "message.parts", reader)
            case "metadata":
                values["metadata"] = metadata_json(message.metadata, "message.metadata", reader)
            case "token_count":
                values["token_count"] = (
                    message.token_count if message.HasField("token_count") else None
                )
            case "feedback":
                has_feedback = message.HasField("feedback")
                values["feedback_score"] = message.feedback.score if has_feedback else None
                values["feedback_comment"] = message.feedback.comment if has_feedback else None
            case _:
                values[path] = getattr(message, path)
    return values
