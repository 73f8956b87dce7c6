"""The export format: JSON lines, each with one item of an export in protobuf's JSON form.

An import also accepts rows of another chatbot's tables: ids of any kind, which become the same UUID
every time; roles as the model APIs name them; times as PostgreSQL writes them; and messages without
a `seq` and chunks without an `index`, in their order.
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
from service.store.document_chunks import Chunk
from service.store.importing import ImportedMessage
from service.store.rows import datetime_from_us

_ROLES_BY_ALIAS = {
    "human": "user",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
}
"""Roles by the names that model APIs and frameworks give them."""
MAX_SEQ = 10_000_000
"""Limit of a session's seqs in a file.

Each seq without a message becomes a tombstone, so without a limit one number could cost hours.
"""
MAX_CLOCK_SKEW_S = 24 * 3600
"""Maximum distance of a time in the future.

Messages that are appended later get times after the session's newest, so a time far in the future
would stay ahead of the clock.
"""
_UNKNOWN_ITEM = (
    'is not an item: a line is {"user": …}, {"session": …}, {"message": …}, {"document": …} or '
    '{"chunk": …}'
)


class InvalidLine(Exception):
    """A line cannot be parsed. The text continues a sentence that begins with "line N"."""


class UserRecord(NamedTuple):
    """A user: the columns of its row."""

    values: dict[str, Any]


class SessionRecord(NamedTuple):
    """A session: the columns of its row, and its state after its messages are stored."""

    values: dict[str, Any]
    last_seq: int
    updated_us: int | None


class DocumentRecord(NamedTuple):
    """A document: the columns of its row."""

    values: dict[str, Any]


class ChunkRecord(NamedTuple):
    """A chunk of the preceding document."""

    chunk_index: int
    chunk: Chunk


Record = UserRecord | SessionRecord | ImportedMessage | DocumentRecord | ChunkRecord


def format_line(item: export_pb2.ExportUserDataResponse) -> str:
    """Return an item as a line, without its line break."""
    body = MessageToDict(item, preserving_proto_field_name=True)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


class LineParser:
    """Parses lines in order: a user, sessions with their messages, documents with their chunks."""

    def __init__(self, user_id: str | None = None) -> None:
        """Start with the first line.

        Args:
            user_id: The user who becomes the owner of all items; the file may then have one user
                only. None keeps the users of the file.
        """
        self._only_user_id = user_id
        self._user_count = 0
        self.user_id = user_id or ""
        """The owner of the current line's item."""
        self._session_id = ""
        self._seq = 0
        self._next_chunk_index: int | None = None
        """None unless the current line is a document or one of its chunks."""
        self._validate = protovalidate.Validator().validate

    def parse(self, line: str | bytes) -> Record:
        """Parse a line.

        Raises:
            InvalidLine: it is not an item, or breaks a rule of the API.
        """
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidLine("is not valid JSON") from None
        if (
            not isinstance(item, dict)
            or len(item) != 1
            or not isinstance(body := next(iter(item.values())), dict)
        ):
            raise InvalidLine(_UNKNOWN_ITEM)
        kind = next(iter(item))
        body = {name: value for name, value in body.items() if value is not None}
        try:
            return self._parse_item(kind, body)
        except InvalidArgument as error:
            raise InvalidLine(f"is not a valid {kind}: {error.message}") from None
        except (ParseError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InvalidLine(f"is not a valid {kind}: {error}") from None

    def _parse_item(self, kind: str, body: dict[str, Any]) -> Record:
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
                raise InvalidLine(_UNKNOWN_ITEM)

    def _user(self, body: dict[str, Any]) -> UserRecord:
        self._next_chunk_index = None
        self._user_count += 1
        if self._only_user_id and self._user_count > 1:
            raise InvalidLine("is a second user, and with --user-id a file may have one user only")
        source_id = str(body.pop("id", ""))
        if not source_id:
            raise InvalidLine("has no id, and a user needs one")
        self.user_id = self._only_user_id or _uuid(
            uuid.NAMESPACE_URL, "chathistory:user", source_id
        )
        if not _is_uuid(source_id):
            body.setdefault("external_id", source_id)
        user = self._parse_body(body, user_pb2.User())
        created_us, updated_us = _times_us(user)
        values = convert.user_values(user, self.user_id)
        return UserRecord(values | _time_columns(created_us, updated_us))

    def _session(self, body: dict[str, Any]) -> SessionRecord:
        if not self.user_id:
            raise InvalidLine(
                "comes before its user: start the file with a user, or pass --user-id"
            )
        self._next_chunk_index = None
        body.pop("user_id", None)
        self._session_id = self._session_uuid(str(body.pop("id", "")))
        self._seq = 0
        session = self._parse_body(body, session_pb2.Session())
        created_us, updated_us = _times_us(session)
        last_seq = _check_seq(session.last_seq)
        # Set after `session_values`, which rejects a new session with summarized messages.
        summarized_through_seq, session.summarized_through_seq = session.summarized_through_seq, 0
        forked_from_id, forked_from_seq = session.forked_from.session_id, session.forked_from.seq
        values = convert.session_values(session, self._session_id)
        values |= _time_columns(created_us, updated_us) | {
            "user_id": self.user_id,
            "summarized_through_seq": summarized_through_seq,
        }
        if forked_from_id:
            values |= {
                "forked_from_id": self._session_uuid(forked_from_id),
                "forked_from_seq": forked_from_seq,
            }
        return SessionRecord(values, last_seq, updated_us if "update_time" in body else None)

    def _message(self, body: dict[str, Any]) -> ImportedMessage:
        if not self._session_id:
            raise InvalidLine("comes before its session")
        session_id = str(body.pop("session_id", ""))
        if session_id and self._session_uuid(session_id) != self._session_id:
            raise InvalidLine("is not a message of the session before it")
        if isinstance(role := body.get("role"), str) and not role.startswith("ROLE_"):
            body["role"] = f"ROLE_{_ROLES_BY_ALIAS.get(role.lower(), role).upper()}"
        seq = _check_seq(int(body.pop("seq", self._seq + 1)))
        if seq <= self._seq:
            raise InvalidLine(f"has seq {seq}, which is not after the previous message's")
        source_id = str(body.pop("id", f"seq {seq}"))
        message_id = _uuid(uuid.UUID(self._session_id), "message", source_id)
        message = self._parse_body(body, message_pb2.Message())
        created_us, updated_us = _times_us(message)
        new_message = convert.new_message(message, message_id, "message")
        self._seq = seq
        return ImportedMessage(seq, created_us, updated_us, new_message)

    def _session_uuid(self, source_id: str) -> str:
        return _uuid(uuid.UUID(self.user_id), "session", source_id)

    def _document(self, body: dict[str, Any]) -> DocumentRecord:
        if not self.user_id:
            raise InvalidLine(
                "comes before its user: start the file with a user, or pass --user-id"
            )
        for name in ("user_id", "scope", "status", "status_detail", "chunk_count"):
            body.pop(name, None)
        document_id = _uuid(uuid.UUID(self.user_id), "document", str(body.pop("id", "")))
        document = self._parse_body(body, document_pb2.Document())
        created_us, updated_us = _times_us(document)
        values = convert_documents.document_values(document, (), document_id)
        values |= _time_columns(created_us, updated_us) | {"user_id": self.user_id}
        self._next_chunk_index = 0
        return DocumentRecord(values)

    def _chunk(self, body: dict[str, Any]) -> ChunkRecord:
        next_index = self._next_chunk_index
        if next_index is None:
            raise InvalidLine("is a chunk that comes before its document")
        body.pop("document_id", None)
        # protobuf's JSON form leaves out a 0, so the first chunk of an export has no index.
        index = int(body.pop("index", next_index))
        if index != next_index:
            raise InvalidLine(f"has index {index}, and the next chunk's index is {next_index}")
        chunk = self._parse_body(body, document_pb2.DocumentChunk())
        self._next_chunk_index = index + 1
        return ChunkRecord(index, convert_documents.new_chunk(chunk))

    def _parse_body(self, body: dict[str, Any], resource: Any) -> Any:
        """Parse a body into a resource, and apply the API's rules to it."""
        for name in ("create_time", "update_time"):
            if name in body:
                body[name] = _rfc3339(body[name])
        ParseDict(body, resource)
        try:
            self._validate(resource)
        except protovalidate.ValidationError as error:
            raise InvalidLine("; ".join(map(_broken_rule, error.violations))) from None
        return resource


def _check_seq(seq: int) -> int:
    if seq > MAX_SEQ:
        raise InvalidLine(f"has a seq above {MAX_SEQ:,}")
    return seq


def _broken_rule(violation: protovalidate.Violation) -> str:
    proto = violation.proto
    path = ".".join(element.field_name for element in proto.field.elements) if proto.field else ""
    return f"{path}: {proto.message or proto.rule_id}"


def _time_columns(created_us: int, updated_us: int) -> dict[str, datetime]:
    return {"created_at": datetime_from_us(created_us), "updated_at": datetime_from_us(updated_us)}


def _times_us(resource: Any) -> tuple[int, int]:
    """Return the creation and update time, by default now and the creation time.

    Raises:
        InvalidLine: a time is in the future.
    """
    now = Timestamp()
    now.GetCurrentTime()
    created = resource.create_time if resource.HasField("create_time") else now
    updated = resource.update_time if resource.HasField("update_time") else created
    if max(created.seconds, updated.seconds) > now.seconds + MAX_CLOCK_SKEW_S:
        raise InvalidLine("has a time in the future")
    return created.ToMicroseconds(), updated.ToMicroseconds()


def _rfc3339(value: object) -> str:
    """Return a time as protobuf writes it, from any form of ISO 8601; UTC if it has no offset."""
    time = datetime.fromisoformat(str(value))
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    return time.isoformat().replace("+00:00", "Z")


@lru_cache(maxsize=1024)
def _uuid(namespace: uuid.UUID, kind: str, source_id: str) -> str:
    """Return a UUID for an id of any kind: always the same, so that an import can be repeated."""
    if _is_uuid(source_id):
        return str(uuid.UUID(source_id))
    if not source_id:
        raise InvalidLine(f"has no id, and a {kind} needs one")
    return str(uuid.uuid5(namespace, f"{kind}:{source_id}"))


def _is_uuid(text: str) -> bool:
    """Return whether a text is a UUID, also in upper case or without hyphens."""
    try:
        return len(text) in (32, 36) and bool(uuid.UUID(text))
    except ValueError:
        return False
