"""The data that the attacks need, stored through the API before anything is measured."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from chathistory.v1 import (
    document_pb2,
    message_pb2,
    session_pb2,
    user_pb2,
)
from google.protobuf.message import Message
from grpc import aio

from benchmarks.hostile.account import Account, new_token
from benchmarks.hostile.calls import CHANNEL_OPTIONS, call
from benchmarks.hostile.matrix import new_struct
from benchmarks.load_generator import BenchError

_CONCURRENCY = 8
_CALL_TIMEOUT_S = 60.0
_ATTEMPTS = 100
_RETRIED = ("RESOURCE_EXHAUSTED", "ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_WORDS = ("hello", "world", "plan", "office", "needle", "alpha", "beta", "lease", "cabling", "date")
_METADATA_BYTES = 15_000
_SYSTEM_MESSAGES = 100_000
_INDEXED_SHARE = 0.1
"""Share of the SYSTEM messages that is stored while search is on: to index all of them would take
minutes, and contexts, for which they are stored, do not use the index."""
DOCUMENT_CHUNKS = 100
"""Chunks of each user's document."""


class _Store:
    """Stores data as a service, in a few concurrent calls, and retries what is refused."""

    def __init__(self, channel: aio.Channel, account: Account) -> None:
        self._channel = channel
        self._metadata = account.metadata(as_service=True)

    async def send(self, rpc: str, request: Message, *, may_fail: bool = False) -> None:
        status = ""
        for _ in range(_ATTEMPTS):
            status = await call(
                self._channel, rpc, request.SerializeToString(), self._metadata, _CALL_TIMEOUT_S
            )
            if not status.startswith(_RETRIED):
                break
            await asyncio.sleep(0.1)
        if status != "OK" and not may_fail:
            raise BenchError(f"the data cannot be stored: {rpc} failed with {status}")

    async def send_all(
        self, rpc: str, requests: Iterable[Message], *, may_fail: bool = False
    ) -> None:
        remaining = iter(requests)

        async def loop() -> None:
            for request in remaining:
                await self.send(rpc, request, may_fail=may_fail)

        async with asyncio.TaskGroup() as group:
            for _ in range(_CONCURRENCY):
                group.create_task(loop())


def new_account(address: str, key: str) -> Account:
    """Return an account of a new user, which is not stored yet."""
    user_id = str(uuid.uuid4())
    return Account(
        address,
        user_id,
        new_token(key, user_id),
        new_token(key, "hostile", is_service=True),
        document_id=str(uuid.uuid4()),
        message_id=str(uuid.uuid4()),
    )


async def store(account: Account, *, is_attacker: bool, scale: float = 1.0) -> None:
    """Store a user: a small history, and for the attacker what makes its requests expensive.

    Args:
        account: The user. Its sessions are added.
        is_attacker: Whether to store the large data.
        scale: Share of the large data, for quick runs.
    """
    async with aio.insecure_channel(account.address, options=CHANNEL_OPTIONS) as channel:
        data = _Store(channel, account)
        user = user_pb2.User(id=account.user_id, email=f"{account.user_id}@example.com")
        await data.send("CreateUser", user_pb2.CreateUserRequest(user=user))
        await _store_small(data, account)
        if is_attacker:
            await _store_long(data, account, scale)
            await _store_large(data, account, scale)


def _message(content: str, **fields: Any) -> message_pb2.Message:
    return message_pb2.Message(
        role=fields.pop("role", message_pb2.ROLE_USER), content=content, **fields
    )


def _appends(
    account: Account, name: str, messages: Sequence[message_pb2.Message], *, per_request: int = 100
) -> Iterable[message_pb2.AppendMessagesRequest]:
    session_id = account.sessions.setdefault(name, str(uuid.uuid4()))
    for start in range(0, len(messages), per_request):
        yield message_pb2.AppendMessagesRequest(
            user_id=account.user_id,
            session_id=session_id,
            messages=messages[start : start + per_request],
            create_if_missing=True,
        )


async def _store_small(data: _Store, account: Account) -> None:
    first = _message("hello world a b c d e", id=account.message_id)
    short = [first] + [_message("hello world a b c d e")] * 299
    for request in _appends(account, "short", short):
        await data.send("AppendMessages", request)
    await data.send_all("AppendMessages", _appends(account, "scratch", [_message("hello")]))
    document = document_pb2.CreateDocumentRequest(
        user_id=account.user_id,
        document=document_pb2.Document(id=account.document_id, title="hello"),
        chunks=[
            document_pb2.DocumentChunk(text=f"hello world {index}")
            for index in range(DOCUMENT_CHUNKS)
        ],
    )
    await data.send("CreateDocument", document)


async def _store_long(data: _Store, account: Account, scale: float) -> None:
    """Store sessions of many messages."""
    long = [
        _message(" ".join(_WORDS[(index * step) % len(_WORDS)] for step in range(1, 30)))
        for index in range(int(20_000 * scale))
    ]
    account.long_count = len(long)
    await data.send_all("AppendMessages", _appends(account, "long", long))
    await _store_system(data, account, _INDEXED_SHARE * scale)
    ids = [str(uuid.uuid4()) for _ in range(int(5_000 * scale))]
    deleted = [_message("gone", id=message_id) for message_id in ids]
    await data.send_all("AppendMessages", _appends(account, "tombstones", deleted))
    await data.send_all(
        "DeleteMessage",
        (
            message_pb2.DeleteMessageRequest(
                user_id=account.user_id,
                session_id=account.sessions["tombstones"],
                message_id=message_id,
            )
            for message_id in ids
        ),
    )
    await data.send_all("AppendMessages", _appends(account, "tombstones", [_message("hello")] * 10))


async def store_remaining(account: Account, scale: float) -> None:
    """Store the messages of an attacker that are not to be indexed."""
    async with aio.insecure_channel(account.address, options=CHANNEL_OPTIONS) as channel:
        await _store_system(_Store(channel, account), account, (1 - _INDEXED_SHARE) * scale)


async def _store_system(data: _Store, account: Account, share: float) -> None:
    system = _message("you are helpful", role=message_pb2.ROLE_SYSTEM)
    messages = [system] * int(_SYSTEM_MESSAGES * share)
    await data.send_all("AppendMessages", _appends(account, "system", messages))


async def _store_large(data: _Store, account: Account, scale: float) -> None:
    """Store resources whose pages are large."""
    await data.send_all(
        "AppendMessages", _appends(account, "page", [_message("a" * 250_000)] * 12, per_request=12)
    )
    emoji = [_message("a" * 1_500 + "😀")] * int(2_000 * scale)
    await data.send_all("AppendMessages", _appends(account, "emoji", emoji))
    objects = _message("objects")
    objects.parts.add().data.CopyFrom(new_struct("nulls", 200_000))
    objects.parts.add().data.CopyFrom(new_struct("numbers", 200_000))
    # A service may reject such objects; then the session is empty.
    await data.send_all("AppendMessages", _appends(account, "objects", [_message("hello")]))
    await data.send_all(
        "AppendMessages", _appends(account, "objects", [objects] * 8, per_request=8), may_fail=True
    )
    metadata = new_struct("numbers", _METADATA_BYTES)
    sessions = (
        session_pb2.CreateSessionRequest(
            user_id=account.user_id, session=session_pb2.Session(metadata=metadata)
        )
        for _ in range(int(1_000 * scale))
    )
    await data.send_all("CreateSession", sessions, may_fail=True)
    documents = (
        document_pb2.CreateDocumentRequest(
            user_id=account.user_id,
            document=document_pb2.Document(title=f"document {index}", metadata=metadata),
            chunks=[document_pb2.DocumentChunk(text="hello world")],
        )
        for index in range(int(1_000 * scale))
    )
    await data.send_all("CreateDocument", documents, may_fail=True)
