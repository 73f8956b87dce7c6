"""The workload: sessions stored before a run, and request bodies for the load generator."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import asyncpg
import uuid_utils
from chathistory.v1 import message_pb2

_PROSE = (
    "Could you look again at the plan for the move to the new office, and find out which of the "
    "three dates would leave enough time for the cabling? The lease ends in March, the installers "
    "ask for two weeks' notice, and I would rather not pay for both places longer than needed; if "
    "none of them works, say so and propose another one. Thank you!"
)
APPEND_CONTENT = _PROSE[:300].ljust(300, ".")
READ_CONTENT = _PROSE[:250]
READ_MESSAGES = 20
"""Messages that one read returns."""
SESSION_MESSAGES = 100
"""Messages stored in each session that is read."""
_ID_PLACEHOLDER = "00000000-0000-4000-8000-000000000000"


def estimated_tokens(content: str) -> int:
    """Return the `token_estimate` that the service stores for a message of this content."""
    return -(-len(content.encode()) // 4)


def reply_size(content: str) -> int:
    """Return approximately the `size` that the service stores for a message of this content."""
    return len(content.encode()) + 256


class Session(NamedTuple):
    """A session's key."""

    user_id: str
    id: str


Bodies = Callable[[Path], Path]
"""Writes a file of request bodies into a folder and returns its path."""


def new_sessions(count: int, per_user: int = 4) -> list[Session]:
    """Return keys of new sessions, with ids of version 7 as the client library generates them."""
    user_ids = [str(uuid_utils.uuid7()) for _ in range(-(-count // per_user))]
    return [Session(user_ids[index // per_user], str(uuid_utils.uuid7())) for index in range(count)]


async def seed(
    connection: asyncpg.Connection, sessions: Sequence[Session], messages: int = 0
) -> None:
    """Store sessions with `messages` messages each.

    The messages of different sessions are interleaved, as after real traffic, so the messages of
    one session are on many pages of the table.
    """
    user_ids = list(dict.fromkeys(session.user_id for session in sessions))
    keys = [session.user_id for session in sessions], [session.id for session in sessions]
    # Skips the check of foreign keys for each row; the rows are consistent.
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(
        "INSERT INTO users (id, fingerprint) SELECT unnest($1::uuid[]), ''", user_ids
    )
    await connection.execute(
        """
        INSERT INTO chat_sessions (user_id, id, last_seq, message_count, fingerprint)
        SELECT user_id, id, $3::bigint, $3::bigint, ''
        FROM unnest($1::uuid[], $2::uuid[]) AS s (user_id, id)
        """,
        *keys,
        messages,
    )
    await connection.execute(
        """
        INSERT INTO chat_messages (
            user_id, session_id, seq, id, role, content, token_estimate, size, fingerprint
        )
        SELECT user_id, session_id, seq, uuidv7(), 1 + (seq + 1) % 2, $4::text, $5, $6,
               decode(md5(seq::text), 'hex')
        FROM (
            SELECT s.user_id, s.id AS session_id, seq
            FROM generate_series(1, $3::bigint) AS seq,
                 unnest($1::uuid[], $2::uuid[]) AS s (user_id, id)
            ORDER BY seq
        ) AS m
        """,
        *keys,
        messages,
        READ_CONTENT,
        estimated_tokens(READ_CONTENT),
        reply_size(READ_CONTENT),
        timeout=600,
    )
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.execute("CHECKPOINT", timeout=600)


async def count_rows(connection: asyncpg.Connection) -> tuple[int, bool]:
    """Return the number of stored messages, and whether every session is numbered without gaps."""
    [row] = await connection.fetch(
        """
        SELECT coalesce(sum(n), 0)::bigint AS rows,
               bool_and(n = last_seq AND n = message_count AND n = newest) AS is_gapless
        FROM (
            SELECT s.last_seq, s.message_count, count(m.seq) AS n,
                   coalesce(max(m.seq), 0) AS newest
            FROM chat_sessions AS s
            LEFT JOIN chat_messages AS m ON m.user_id = s.user_id AND m.session_id = s.id
            GROUP BY s.user_id, s.id
        ) AS counted
        """,
        timeout=600,
    )
    return row["rows"], row["is_gapless"]


def write_records(path: Path, records: Iterable[bytes]) -> Path:
    """Write a file for the load generator: records, each after its length."""
    with path.open("wb") as file:
        file.writelines(
            part for record in records for part in (struct.pack("<I", len(record)), record)
        )
    return path


def append_request() -> bytes:
    """Return the body of an append of one message."""
    [session] = new_sessions(1)
    message = message_pb2.Message(
        id=str(uuid_utils.uuid7()), role=message_pb2.ROLE_USER, content=APPEND_CONTENT
    )
    request = message_pb2.AppendMessagesRequest(
        user_id=session.user_id, session_id=session.id, messages=[message]
    )
    return request.SerializeToString()


def append_bodies(sessions: Sequence[Session], count: int, messages: int = 1) -> Bodies:
    """Return `count` appends to the sessions in turn. Every message has a new id."""
    return _with_new_ids(
        "append",
        count,
        [
            message_pb2.AppendMessagesRequest(
                user_id=session.user_id,
                session_id=session.id,
                messages=[
                    message_pb2.Message(
                        id=_ID_PLACEHOLDER, role=message_pb2.ROLE_USER, content=APPEND_CONTENT
                    )
                    for _ in range(messages)
                ],
            ).SerializeToString()
            for session in sessions
        ],
    )


def _with_new_ids(name: str, count: int, bodies: Sequence[bytes]) -> Bodies:
    """Write `count` of the bodies in turn, with a new id for each placeholder.

    Serializing every request with the generated code would take longer than the calls.
    """
    templates = [body.split(_ID_PLACEHOLDER.encode()) for body in bodies]

    def fill(template: list[bytes]) -> bytes:
        parts = [template[0]]
        for part in template[1:]:
            parts += (str(uuid_utils.uuid7()).encode(), part)
        return b"".join(parts)

    def write(folder: Path) -> Path:
        # Every file starts at another session. Otherwise short runs would only use the first
        # sessions of a large database.
        start = random.randrange(len(templates))  # noqa: S311 - no secret
        turns = islice(cycle(templates[start:] + templates[:start]), count)
        return write_records(folder / name, (fill(template) for template in turns))

    return write


def _in_turn(name: str, bodies: list[bytes]) -> Bodies:
    def write(folder: Path) -> Path:
        start = random.randrange(len(bodies))  # noqa: S311 - no secret
        return write_records(folder / name, bodies[start:] + bodies[:start])

    return write


def context_bodies(sessions: Sequence[Session]) -> Bodies:
    """Return one GetContext for each session."""
    requests = (
        message_pb2.GetContextRequest(
            user_id=session.user_id, session_id=session.id, max_messages=READ_MESSAGES
        )
        for session in sessions
    )
    return _in_turn("context", [request.SerializeToString() for request in requests])


def list_bodies(sessions: Sequence[Session], page_token: str = "") -> Bodies:
    """Return one ListMessages for each session."""
    requests = (
        message_pb2.ListMessagesRequest(
            user_id=session.user_id,
            session_id=session.id,
            page_size=READ_MESSAGES,
            page_token=page_token,
        )
        for session in sessions
    )
    return _in_turn("list", [request.SerializeToString() for request in requests])


def http_append_bodies(sessions: Sequence[Session], count: int) -> Bodies:
    """Return `count` appends to the sessions in turn, as HTTP requests to the baseline."""
    body = json.dumps({"id": _ID_PLACEHOLDER, "role": 1, "content": APPEND_CONTENT})
    return _with_new_ids(
        "http-append", count, [_http("POST", _messages_path(session), body) for session in sessions]
    )


def http_list_bodies(sessions: Sequence[Session]) -> Bodies:
    """Return one list request for each session, as HTTP requests to the baseline."""
    paths = (f"{_messages_path(session)}?limit={READ_MESSAGES}" for session in sessions)
    return _in_turn("http-list", [_http("GET", path) for path in paths])


def _messages_path(session: Session) -> str:
    return f"/users/{session.user_id}/sessions/{session.id}/messages"


def _http(method: str, path: str, body: str = "") -> bytes:
    content = body.encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: bench\r\naccept: application/json\r\n"
    if content:
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return f"{head}\r\n".encode() + content
