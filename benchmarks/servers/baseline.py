"""The baseline: a backend with FastAPI, Pydantic and SQLAlchemy's ORM, on the same tables.

It follows their documentation: one ORM session per request, a lock on the chat session's row for
the next `seq`, and one commit. The driver is asyncpg.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from benchmarks.servers.lifecycle import announce_address, database_url, run
from benchmarks.workload import estimated_tokens, reply_size
from service.store import tables
from service.store.db import dsn

app = FastAPI()
_target = dsn.parse(database_url())
_engine = create_async_engine(
    _target.url,
    connect_args=_target.connect_args,
    pool_size=16,
    max_overflow=0,
    execution_options={"schema_translate_map": {None: tables.SCHEMA}},
)
_new_session = async_sessionmaker(_engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """Base of the mapped classes."""


class ChatSession(Base):
    """A session's row."""

    __table__ = tables.chat_sessions


class ChatMessage(Base):
    """A message's row."""

    # SQLAlchemy reserves the attribute name `metadata`.
    __table__ = tables.chat_messages
    __mapper_args__ = {"exclude_properties": ["metadata"]}  # noqa: RUF012 - required by SQLAlchemy


class MessageIn(BaseModel):
    """A message to store."""

    id: UUID
    role: int
    content: str


class MessageOut(BaseModel):
    """A stored message."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    seq: int
    role: int
    content: str
    created_at: datetime
    updated_at: datetime


class AppendResult(BaseModel):
    """Sequence number and time of a stored message."""

    id: UUID
    seq: int
    created_at: datetime


async def _database() -> AsyncIterator[AsyncSession]:
    async with _new_session() as session:
        yield session


Database = Annotated[AsyncSession, Depends(_database)]


@app.post("/users/{user_id}/sessions/{session_id}/messages")
async def append(
    user_id: UUID, session_id: UUID, new_message: MessageIn, database: Database
) -> AppendResult:
    """Append a message."""
    key = {"user_id": str(user_id), "id": str(session_id)}
    chat: Any = await database.get(ChatSession, key, with_for_update=True)
    if chat is None:
        raise HTTPException(404)
    now = await database.scalar(select(func.clock_timestamp()))
    chat.last_seq += 1
    chat.message_count += 1
    chat.updated_at = now
    message: Any = ChatMessage(
        user_id=str(user_id),
        session_id=str(session_id),
        seq=chat.last_seq,
        id=str(new_message.id),
        role=new_message.role,
        content=new_message.content,
        token_estimate=estimated_tokens(new_message.content),
        size=reply_size(new_message.content),
        created_at=now,
        updated_at=now,
        fingerprint=b"0123456789abcdef",
    )
    database.add(message)
    await database.commit()
    return AppendResult(id=message.id, seq=message.seq, created_at=message.created_at)


@app.get("/users/{user_id}/sessions/{session_id}/messages")
async def list_messages(
    user_id: UUID, session_id: UUID, database: Database, limit: int = 50
) -> list[MessageOut]:
    """List a session's first messages."""
    messages: Any = tables.chat_messages.c
    query = (
        select(ChatMessage)
        .where(messages.user_id == str(user_id), messages.session_id == str(session_id))
        .order_by(messages.seq)
        .limit(limit)
    )
    return [MessageOut.model_validate(row) for row in await database.scalars(query)]


async def _main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http="httptools", loop="uvloop", log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    # The socket listens already, so early connections wait until the server accepts them.
    announce_address(f"127.0.0.1:{listener.getsockname()[1]}")
    await server.serve(sockets=[listener])
    await _engine.dispose()


if __name__ == "__main__":
    run(_main())
