"""A user's data as lines of JSON: each line is one item of an export, in protobuf's JSON form.

What comes in may also be rows of an existing chatbot's own tables: ids of any kind (each becomes the same UUID every time), roles in the
words of the model APIs, times as PostgreSQL writes them, messages without a `seq`, in their order.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import protovalidate
from chathistory.v1 import document_pb2, export_pb2, message_pb2, session_pb2, user_pb2
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.timestamp_pb2 import Timestamp

from service.errors import InvalidArgument
from service.rpc import convert, convert_documents
from service.store.chunks import Chunk
from service.store.importing import ImportedMessage
from service.store.rows import datetime_from_us

_ROLES = {
    "human": "user",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
}
MAX_SEQ = 10_000_000
"""Of a session in a file: each place without a message becomes a tombstone, and a mere number must not cost more than a while."""
CLOCKS_DIFFER = 24 * 3600
"""Seconds that a time may lie ahead. All that is appended to a session comes after its newest time, so one far ahead would stay."""
_UNKNOWN = 'holds no item: a line is {"user": …}, {"session": …}, {"message": …}, {"document": …} or {"chunk": …}'


class BadLine(Exception):
    """A line cannot be read; the text says what is wrong with it."""


class UserLine(NamedTuple):
    """A user: the columns of its row."""

    values: dict[str, Any]


class SessionLine(NamedTuple):
    """A session: the columns of its row, and what it comes to at its end."""

    values: dict[str, Any]
    last_seq: int
    updated_us: int | None


class DocumentLine(NamedTuple):
    """A document: the columns of its row."""

    values: dict[str, Any]


class ChunkLine(NamedTuple):
    """A chunk of the document before it."""

    place: int
    chunk: Chunk


Line = UserLine | SessionLine | ImportedMessage | DocumentLine | ChunkLine


def write(item: export_pb2.ExportUserDataResponse) -> str:
    """Return an item as a line."""
    plain = MessageToDict(item, preserving_proto_field_name=True)
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


class Reader:
    """Reads lines in their order: a session belongs to the user before it, a message to the session before it."""

    def __init__(self, user_id: str | None = None) -> None:
        """Begin; with `user_id` everything becomes that user's, and the file may hold one user only."""
        self._only = user_id
        self._users = 0
        self.user_id = user_id or ""
        self._session_id = ""
        self._seq = 0
        self._validate = protovalidate.Validator().validate

    def read(self, text: str | bytes) -> Line:
        """Read a line.

        Raises:
            BadLine: it is no item, or breaks a rule of the API.
        """
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise BadLine("is no JSON") from None
        if (
            not isinstance(line, dict)
            or len(line) != 1
            or not isinstance(body := next(iter(line.values())), dict)
        ):
            raise BadLine(_UNKNOWN)
        kind = next(iter(line))
        body = {name: value for name, value in body.items() if value is not None}
        try:
            match kind:
                case "user":
                    return self._user(body)
                case "session":
                    return self._session(body)
                case "message":
                    return self._message(body)
                case "document":
                    return self._document(body)
                case "chunk":
                    return self._chunk(body)
                case _:
                    raise BadLine(_UNKNOWN)
        except InvalidArgument as error:
            raise BadLine(error.message) from None
        except (ParseError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise BadLine(f"is no {kind}: {error}") from None

    def _user(self, body: dict[str, Any]) -> UserLine:
        self._users += 1
        if self._only and self._users > 1:
            raise BadLine("is a second user, and all was to become one user's")
        old = str(body.pop("id", ""))
        if not old:
            raise BadLine("has no id")
        self.user_id = self._only or _uuid(uuid.NAMESPACE_URL, "chathistory:user", old)
        if not _is_uuid(old):
            body.setdefault("external_id", old)
        user = self._parsed(body, user_pb2.User())
        created, updated = _times(user)
        values = convert.user_values(user, self.user_id)
        return UserLine(
            values
            | {"created_at": datetime_from_us(created), "updated_at": datetime_from_us(updated)}
        )

    def _session(self, body: dict[str, Any]) -> SessionLine:
        if not self.user_id:
            raise BadLine(
                "comes before its user: begin with a user, or say whose all of it becomes"
            )
        body.pop("user_id", None)
        self._session_id = _uuid(uuid.UUID(self.user_id), "session", str(body.pop("id", "")))
        self._seq = 0
        session = self._parsed(body, session_pb2.Session())
        created, updated = _times(session)
        last_seq, summarized = _place(session.last_seq), session.summarized_through_seq
        session.summarized_through_seq = (
            0  # Of a session that is being created, no message can be summarized yet.
        )
        origin = session.forked_from.session_id, session.forked_from.seq
        values = convert.session_values(session, self._session_id) | {
            "user_id": self.user_id,
            "summarized_through_seq": summarized,
            "created_at": datetime_from_us(created),
            "updated_at": datetime_from_us(updated),
        }
        if origin[0]:
            values |= {
                "forked_from_id": self._session_uuid(origin[0]),
                "forked_from_seq": origin[1],
            }
        return SessionLine(values, last_seq, updated if "update_time" in body else None)

    def _message(self, body: dict[str, Any]) -> ImportedMessage:
        if not self._session_id:
            raise BadLine("comes before its session")
        if (given := str(body.pop("session_id", ""))) and self._session_uuid(
            given
        ) != self._session_id:
            raise BadLine("is not of the session before it")
        if isinstance(role := body.get("role"), str) and not role.startswith("ROLE_"):
            body["role"] = f"ROLE_{_ROLES.get(role.lower(), role).upper()}"
        seq = _place(int(body.pop("seq", self._seq + 1)))
        if seq <= self._seq:
            raise BadLine("comes after a message with its seq or a higher one")
        session = uuid.UUID(self._session_id)
        message_id = _uuid(session, "message", str(body.pop("id", f"seq {seq}")))
        sent = self._parsed(body, message_pb2.Message())
        created, updated = _times(sent)
        message = convert.new_message(sent, message_id, "message")
        self._seq = seq
        return ImportedMessage(seq, created, updated, message)

    def _session_uuid(self, given: str) -> str:
        return _uuid(uuid.UUID(self.user_id), "session", given)

    def _document(self, body: dict[str, Any]) -> DocumentLine:
        if not self.user_id:
            raise BadLine("comes before its user")
        for name in ("user_id", "scope", "status", "status_detail", "chunk_count"):
            body.pop(name, None)
        document_id = _uuid(uuid.UUID(self.user_id), "document", str(body.pop("id", "")))
        document = self._parsed(body, document_pb2.Document())
        created, updated = _times(document)
        values = convert_documents.document_values(document, (), document_id) | {
            "user_id": self.user_id,
            "created_at": datetime_from_us(created),
            "updated_at": datetime_from_us(updated),
        }
        return DocumentLine(values)

    def _chunk(self, body: dict[str, Any]) -> ChunkLine:
        body.pop("document_id", None)
        index = int(body.pop("index", 0))
        chunk = self._parsed(body, document_pb2.DocumentChunk())
        return ChunkLine(index, convert_documents.new_chunk(chunk))

    def _parsed(self, body: dict[str, Any], into: Any) -> Any:
        """Read a body, and hold it to the rules that a call would be held to."""
        for name in ("create_time", "update_time"):
            if name in body:
                body[name] = _time(body[name])
        parsed = ParseDict(body, into)
        try:
            self._validate(parsed)
        except protovalidate.ValidationError as error:
            raise BadLine("; ".join(map(_broken_rule, error.violations))) from None
        return parsed


def _place(seq: int) -> int:
    if seq > MAX_SEQ:
        raise BadLine(f"has a place beyond {MAX_SEQ:,}")
    return seq


def _broken_rule(violation: protovalidate.Violation) -> str:
    found = violation.proto
    path = ".".join(element.field_name for element in found.field.elements) if found.field else ""
    return f"{path}: {found.message or found.rule_id}"


def _times(item: Any) -> tuple[int, int]:
    """Return when an item was made and changed; what is not said is now, or when it was made.

    Raises:
        BadLine: a time lies in the future.
    """
    now = Timestamp()
    now.GetCurrentTime()
    created = item.create_time if item.HasField("create_time") else now
    updated = item.update_time if item.HasField("update_time") else created
    if max(created.seconds, updated.seconds) > now.seconds + CLOCKS_DIFFER:
        raise BadLine("has a time that lies in the future")
    return created.ToMicroseconds(), updated.ToMicroseconds()


def _time(value: object) -> str:
    """Return a time as protobuf writes it, from any form of ISO 8601; without a zone it is UTC."""
    found = datetime.fromisoformat(str(value))
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found.isoformat().replace("+00:00", "Z")


@lru_cache(maxsize=1024)
def _uuid(namespace: uuid.UUID, kind: str, old: str) -> str:
    """Return an id as a UUID: the same every time, so that an import can be run again."""
    if _is_uuid(old):
        return str(uuid.UUID(old))
    if not old:
        raise BadLine(f"has no id, and a {kind} needs one")
    return str(uuid.uuid5(namespace, f"{kind}:{old}"))


def _is_uuid(text: str) -> bool:
    try:
        return len(text) in (32, 36) and bool(uuid.UUID(text))
    except ValueError:
        return False
