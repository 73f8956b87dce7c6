"""Attacks by writes: contents that are expensive to convert, store, copy or delete."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from chathistory.v1 import (
    document_pb2,
    message_pb2,
    session_pb2,
    user_pb2,
)

from benchmarks.hostile.data import DOCUMENT_CHUNKS
from benchmarks.hostile.matrix import new_struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.hostile.assault import Assault

MAX_DATA_BYTES = 1_000_000
"""A `data` part just below the limit of a message."""
_MAX_METADATA_BYTES = 16_000
_CONTENT_BYTES = 262_144


def append(assault: Assault, session_id: str, messages: Sequence[message_pb2.Message]) -> bytes:
    """Return an append that creates its session if necessary."""
    return message_pb2.AppendMessagesRequest(
        user_id=assault.account.user_id,
        session_id=session_id,
        messages=messages,
        create_if_missing=True,
    ).SerializeToString()


def text_message(content: str) -> message_pb2.Message:
    """Return a user's message."""
    return message_pb2.Message(role=message_pb2.ROLE_USER, content=content)


def new_session_id(assault: Assault) -> str:
    """Return an id that the attack's seed determines."""
    return str(uuid.UUID(int=assault.chance.getrandbits(128), version=4))


async def objects(assault: Assault) -> None:
    """Append objects of extreme shapes, and read them back."""
    shape, in_data = assault.parameter("shape"), assault.parameter("place") == "data"
    session_id = new_session_id(assault)
    struct = new_struct(shape, MAX_DATA_BYTES if in_data else _MAX_METADATA_BYTES)
    message = text_message("hello")
    if in_data:
        message.parts.add().data.CopyFrom(struct)
    else:
        message.metadata.CopyFrom(struct)
    body = append(assault, session_id, [message] * (3 if in_data else 100))
    read = message_pb2.ListMessagesRequest(
        user_id=assault.account.user_id, session_id=session_id, page_size=1000
    ).SerializeToString()
    concurrency = assault.parameter("concurrency")
    await assault.begin()
    await asyncio.gather(
        assault.flood("AppendMessages", [body], concurrency=concurrency),
        assault.flood("ListMessages", [read], concurrency=concurrency),
    )


async def large_appends(assault: Assault) -> None:
    """Append requests just below 4 MiB, each to a session of its own."""
    message = text_message("a" * (_CONTENT_BYTES - 64))
    bodies = [append(assault, new_session_id(assault), [message] * 14) for _ in range(4)]
    await assault.begin()
    await assault.flood(
        "AppendMessages", bodies, concurrency=assault.parameter("concurrency"), connections=4
    )


async def bulk(assault: Assault) -> None:
    """Import with full requests, as fast as the service takes them."""
    account, rpc = assault.account, assault.parameter("rpc")
    chunks = [document_pb2.DocumentChunk(text=f"{index} chunk " * 80) for index in range(1_000)]
    if rpc == "AppendMessages":
        messages = [text_message("b" * 10_000)] * 100
        bodies = [append(assault, new_session_id(assault), messages) for _ in range(16)]
    elif rpc == "CreateDocument":
        document = document_pb2.Document(title="import")
        bodies = [
            document_pb2.CreateDocumentRequest(
                user_id=account.user_id, document=document, chunks=chunks
            ).SerializeToString()
        ]
    else:
        bodies = [
            document_pb2.AppendDocumentChunksRequest(
                user_id=account.user_id,
                document_id=account.document_id,
                first_index=DOCUMENT_CHUNKS,
                chunks=chunks,
            ).SerializeToString()
        ]
    await assault.begin()
    await assault.flood(rpc, bodies, concurrency=64, connections=4)


async def update_masks(assault: Assault) -> None:
    """Update with masks of unknown paths."""
    request = session_pb2.UpdateSessionRequest(
        user_id=assault.account.user_id,
        session=session_pb2.Session(id=assault.account.sessions["scratch"], title="title"),
    )
    request.update_mask.paths.extend(f"path{index}" for index in range(assault.parameter("paths")))
    body = request.SerializeToString()
    await assault.begin()
    await assault.flood("UpdateSession", [body], concurrency=assault.parameter("concurrency"))


async def forks(assault: Assault) -> None:
    """Copy a long session, as often as possible."""
    body = session_pb2.ForkSessionRequest(
        user_id=assault.account.user_id,
        session_id=assault.account.sessions["long"],
        through_seq=assault.account.long_count,
    ).SerializeToString()
    await assault.begin()
    await assault.flood("ForkSession", [body], concurrency=assault.parameter("concurrency"))


async def large_deletions(assault: Assault) -> None:
    """Delete sessions of many messages concurrently."""
    sessions = [new_session_id(assault) for _ in range(assault.parameter("sessions"))]
    message = text_message("a message that is to be deleted")
    # The sessions are copies: a fork is faster than appends.
    await assault.prepare(
        "AppendMessages",
        [append(assault, sessions[0], [message] * 100)] * (assault.parameter("messages") // 100),
    )
    await assault.prepare(
        "ForkSession",
        [
            session_pb2.ForkSessionRequest(
                user_id=assault.account.user_id,
                session_id=sessions[0],
                through_seq=assault.parameter("messages") - 1_000,
                new_session_id=session_id,
            ).SerializeToString()
            for session_id in sessions[1:]
        ],
    )
    bodies = [
        session_pb2.DeleteSessionRequest(
            user_id=assault.account.user_id, session_id=session_id, allow_missing=True
        ).SerializeToString()
        for session_id in sessions
    ]
    await assault.begin()
    await assault.flood("DeleteSession", bodies, concurrency=2 * len(bodies))


async def deletion_race(assault: Assault) -> None:
    """Delete a session while others append to it."""
    session_id = new_session_id(assault)
    body = append(assault, session_id, [text_message("a message that races with a deletion")])
    deletion = session_pb2.DeleteSessionRequest(
        user_id=assault.account.user_id, session_id=session_id, allow_missing=True
    ).SerializeToString()
    concurrency = assault.parameter("concurrency")
    await assault.begin()
    await asyncio.gather(
        assault.flood("AppendMessages", [body], concurrency=concurrency),
        assault.flood("DeleteSession", [deletion], concurrency=max(concurrency // 8, 1)),
    )


async def tombstones(assault: Assault) -> None:
    """Delete the messages of a session one by one, while contexts of it are read."""
    session_id = new_session_id(assault)
    ids = [str(uuid.UUID(int=assault.chance.getrandbits(128), version=4)) for _ in range(5_000)]
    messages = [
        message_pb2.Message(id=message_id, role=message_pb2.ROLE_USER, content="hello")
        for message_id in ids
    ]
    await assault.prepare(
        "AppendMessages",
        [append(assault, session_id, messages[at : at + 100]) for at in range(0, len(ids), 100)],
    )
    user_id = assault.account.user_id
    deletions = [
        message_pb2.DeleteMessageRequest(
            user_id=user_id, session_id=session_id, message_id=message_id, allow_missing=True
        ).SerializeToString()
        for message_id in ids
    ]
    context = message_pb2.GetContextRequest(
        user_id=user_id, session_id=session_id, max_messages=1000
    ).SerializeToString()
    await assault.begin()
    await asyncio.gather(
        assault.flood("DeleteMessage", deletions, concurrency=assault.parameter("concurrency")),
        assault.flood("GetContext", [context], concurrency=4),
    )


async def duplicate_users(assault: Assault) -> None:
    """Create the same users concurrently, as a service."""
    bodies = []
    for index in range(50):
        user_id = str(uuid.UUID(int=assault.chance.getrandbits(128), version=4))
        user = user_pb2.User(
            id=user_id, email=f"{user_id}@example.com", external_id=f"{index}-{user_id}"
        )
        bodies += [user_pb2.CreateUserRequest(user=user).SerializeToString()] * 12
    await assault.begin()
    await assault.flood(
        "CreateUser", bodies, concurrency=assault.parameter("concurrency"), caller="service"
    )


async def one_session(assault: Assault) -> None:
    """Append to one session from many callers."""
    body = append(assault, new_session_id(assault), [text_message("hello")])
    await assault.begin()
    await assault.flood(
        "AppendMessages", [body], concurrency=assault.parameter("concurrency"), connections=4
    )


async def snippets(assault: Assault) -> None:
    """Search messages whose matches are far apart and full of characters to escape."""
    session_id = new_session_id(assault)
    content = "needle " + "&" * 30_000 + " needle"
    await assault.prepare(
        "AppendMessages", [append(assault, session_id, [text_message(content)] * 50)] * 2
    )
    body = message_pb2.SearchMessagesRequest(
        user_id=assault.account.user_id,
        session_id=session_id,
        query="needle",
        limit=100,
        mode=message_pb2.SEARCH_MODE_LEXICAL,
    ).SerializeToString()
    await assault.begin()
    await assault.flood("SearchMessages", [body], concurrency=assault.parameter("concurrency"))
