"""The only place where rows meet the generated code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from chathistory.v1 import message_pb2, session_pb2, user_pb2
from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct

from service.errors import InvalidArgument
from service.store.append.request import NewMessage
from service.store.messages import estimate_tokens
from service.store.rows import MessageRow, SessionRow, UserRow

MAX_METADATA_BYTES = 16 * 1024
MAX_MESSAGE_BYTES = 1024 * 1024

_OVERHEAD_BYTES = 192
"""What a message has in a reply beside what its client sent: ids, seq, times, etag, framing."""
_MICROS = 1_000_000
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


def time(us: int) -> Any:
    """Return what a Timestamp field takes for so many microseconds since 1970."""
    return {"seconds": us // _MICROS, "nanos": us % _MICROS * 1000}


def canonical(message: ProtoMessage, output_only: Iterable[str], id_: str) -> bytes:
    """Clear what the client cannot write, set the id, and return the fingerprint of the rest."""
    for name in output_only:
        message.ClearField(name)
    if message.id != id_:  # type: ignore[attr-defined]
        message.id = id_  # type: ignore[attr-defined]
    return hashlib.blake2b(message.SerializeToString(deterministic=True), digest_size=16).digest()


def fork_fingerprint(session_id: str, through_seq: int) -> bytes:
    """Return the fingerprint of a session that is made by a fork."""
    return hashlib.blake2b(f"fork {session_id} {through_seq}".encode(), digest_size=16).digest()


def struct_json(struct: Struct, field: str) -> str | None:
    """Return a Struct as JSON, None when it is empty.

    Raises:
        InvalidArgument: it is larger than 16 KiB, or holds a NUL, a NaN or an infinity.
    """
    if not struct.fields:
        return None
    if struct.ByteSize() > MAX_METADATA_BYTES:
        raise InvalidArgument.field(field, f"must be at most {MAX_METADATA_BYTES} bytes")
    return json.dumps(_plain(struct, field), separators=(",", ":"), ensure_ascii=False)


def _plain(struct: Struct, field: str) -> Any:
    try:
        value = MessageToDict(struct)
    except (SerializeToJsonError, ValueError):  # JSON has no word for them.
        raise InvalidArgument.field(field, "must not hold NaN or an infinity") from None
    _check(value, field)
    return value


def _check(value: Any, field: str) -> None:
    """Refuse what PostgreSQL's jsonb cannot hold.

    Raises:
        InvalidArgument: naming the field.
    """
    match value:
        case str() if "\0" in value:
            raise InvalidArgument.field(field, "must not contain NUL")
        case dict():
            for key, item in value.items():
                _check(key, field)
                _check(item, field)
        case list():
            for item in value:
                _check(item, field)


def user(row: UserRow) -> user_pb2.User:
    """Make the resource of a row."""
    return user_pb2.User(
        id=row.id,
        external_id=row.external_id or "",
        email=row.email or "",
        name=row.name,
        metadata=struct(row.metadata),
        create_time=time(row.created_us),
        update_time=time(row.updated_us),
        etag=row.etag,
    )


def session(row: SessionRow) -> session_pb2.Session:
    """Make the resource of a row."""
    return session_pb2.Session(
        id=row.id,
        user_id=row.user_id,
        title=row.title,
        summary=row.summary,
        summarized_through_seq=row.summarized_through_seq,
        metadata=struct(row.metadata),
        state=row.state,  # type: ignore[arg-type]
        last_seq=row.last_seq,
        message_count=row.message_count,
        create_time=time(row.created_us),
        update_time=time(row.updated_us),
        etag=row.etag,
        forked_from=_forked_from(row),
    )


def _forked_from(row: SessionRow) -> session_pb2.ForkedFrom | None:
    if row.forked_from_id is None:
        return None
    return session_pb2.ForkedFrom(session_id=row.forked_from_id, seq=row.forked_from_seq or 0)


def message(
    row: MessageRow, session_id: str, make: Callable[..., message_pb2.Message] = message_pb2.Message
) -> message_pb2.Message:
    """Make the resource of a row; `make` may be the `add` of a reply's list, so that nothing is copied."""
    # Field by field and in place: names in the constructor cost more, and a Timestamp given to it is made, copied and thrown away.
    made = make()
    made.id = row.id
    made.session_id = session_id
    made.seq = row.seq
    made.role = row.role  # type: ignore[assignment]
    made.content = row.content
    made.etag = row.etag
    moment = made.create_time
    moment.seconds, moment.nanos = row.created_us // _MICROS, row.created_us % _MICROS * 1000
    moment = made.update_time
    moment.seconds, moment.nanos = row.updated_us // _MICROS, row.updated_us % _MICROS * 1000
    if row.token_count is not None:
        made.token_count = row.token_count
    if row.author:
        made.author = row.author
    if row.parts is not None:
        for part in json.loads(row.parts):
            made.parts.add(**part)
    if row.metadata is not None:
        made.metadata.update(json.loads(row.metadata))
    if row.feedback_score is not None:
        made.feedback.score = row.feedback_score
        made.feedback.comment = row.feedback_comment or ""
    return made


def message_size(row: MessageRow) -> int:
    """Return roughly how many bytes a message takes in a reply."""
    return message(row, "").ByteSize() + _OVERHEAD_BYTES


def struct(text: str | None) -> Any:
    """Return what a Struct field takes for JSON."""
    return None if text is None else json.loads(text)


def new_message(sent: message_pb2.Message, id_: str, field: str) -> NewMessage:
    """Read a message of an append; `field` is its path in the request.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot say.
    """
    if not sent.role:
        raise InvalidArgument.field(f"{field}.role", "is required")
    if sent.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument.field(field, f"must be at most {MAX_MESSAGE_BYTES} bytes")
    fingerprint = canonical(sent, _MESSAGE_OUTPUT_ONLY, id_)
    content = sent.content
    parts = parts_json(sent.parts, f"{field}.parts") if sent.parts else None
    metadata = (
        struct_json(sent.metadata, f"{field}.metadata") if sent.HasField("metadata") else None
    )
    feedback = sent.feedback if sent.HasField("feedback") else None
    return NewMessage(
        id_,
        sent.role,
        content,
        parts,
        metadata,
        sent.token_count if sent.HasField("token_count") else None,
        estimate_tokens(content, parts),
        sent.ByteSize() + _OVERHEAD_BYTES,
        sent.author,
        feedback.score if feedback else None,
        feedback.comment if feedback else None,
        fingerprint,
    )


def parts_json(parts: Iterable[message_pb2.Part], field: str) -> str | None:
    """Return parts as JSON: a list of objects, each with its kind's name; None when there is none.

    Raises:
        InvalidArgument: a Struct in them holds what cannot be stored.
    """
    plain = [_plain_part(part, f"{field}[{n}]") for n, part in enumerate(parts)]
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False) if plain else None


def _plain_part(part: message_pb2.Part, field: str) -> dict[str, Any]:
    kind = part.WhichOneof("kind")
    if kind is None or kind == "text":
        return {"text": part.text}
    if kind == "data":
        return {"data": _plain(part.data, f"{field}.data")}
    # Scalars only, under the names of the protos; `id` of a call and `tool_call_id` of a result are required, so context.py finds them.
    return {
        kind: {descriptor.name: value for descriptor, value in getattr(part, kind).ListFields()}
    }


def user_values(sent: user_pb2.User, id_: str) -> dict[str, Any]:
    """Read a user to create.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot say.
    """
    fingerprint = canonical(sent, _USER_OUTPUT_ONLY, id_)
    return user_changes(sent, ("external_id", "email", "name", "metadata")) | {
        "id": id_,
        "fingerprint": fingerprint,
    }


def user_changes(sent: user_pb2.User, paths: Iterable[str]) -> dict[str, Any]:
    """Read those fields of a user; an empty `external_id` or `email` is none.

    Raises:
        InvalidArgument: as `user_values`.
    """
    return {path: _user_value(sent, path) for path in paths}


def _user_value(sent: user_pb2.User, path: str) -> Any:
    match path:
        case "metadata":
            return loaded(struct_json(sent.metadata, "user.metadata"))
        case "external_id" | "email":
            return getattr(sent, path) or None
        case _:
            return getattr(sent, path)


def session_values(sent: session_pb2.Session, id_: str) -> dict[str, Any]:
    """Read a session to create.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot say.
    """
    if sent.summarized_through_seq:
        raise InvalidArgument.field(
            "session.summarized_through_seq", "is beyond the new session's last_seq, 0"
        )
    fingerprint = canonical(sent, _SESSION_OUTPUT_ONLY, id_)
    paths = (
        ("title", "summary", "metadata", "state")
        if sent.state
        else ("title", "summary", "metadata")
    )
    return session_changes(sent, paths) | {"id": id_, "fingerprint": fingerprint}


def session_changes(sent: session_pb2.Session, paths: Iterable[str]) -> dict[str, Any]:
    """Read those fields of a session.

    Raises:
        InvalidArgument: as `session_values`.
    """
    values = {path: getattr(sent, path) for path in paths}
    if "metadata" in values:
        values["metadata"] = loaded(struct_json(sent.metadata, "session.metadata"))
    if values.get("state") == session_pb2.SESSION_STATE_UNSPECIFIED:
        raise InvalidArgument.field("session.state", "must be ACTIVE or ARCHIVED")
    return values


def message_changes(sent: message_pb2.Message, paths: Iterable[str]) -> dict[str, Any]:
    """Read those fields of a message; `feedback` becomes its two columns.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot say.
    """
    if sent.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument.field("message", f"must be at most {MAX_MESSAGE_BYTES} bytes")
    values: dict[str, Any] = {}
    for path in paths:
        match path:
            case "parts":
                values["parts"] = parts_json(sent.parts, "message.parts")
            case "metadata":
                values["metadata"] = struct_json(sent.metadata, "message.metadata")
            case "token_count":
                values["token_count"] = sent.token_count if sent.HasField("token_count") else None
            case "feedback":
                given = sent.HasField("feedback")
                values["feedback_score"] = sent.feedback.score if given else None
                values["feedback_comment"] = sent.feedback.comment if given else None
            case _:
                values[path] = getattr(sent, path)
    return values


def loaded(text: str | None) -> Any:
    """Return JSON as the objects that SQLAlchemy writes; an empty one is NULL."""
    return None if text is None else json.loads(text)
