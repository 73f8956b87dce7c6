"""Attempts to violate every constraint of the tables, with a secret in every text.

`PROVOCATIONS` names the constraints that each function tries to violate. `WRITERS` holds a function
for each table, which writes a row with one column set to None.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID, uuid5

import asyncpg
import pytest
from chathistory.v1 import message_pb2

from service.errors import AlreadyExists
from service.rpc import convert
from service.server import Server
from service.store import documents, importing, messages, sessions, slices, users
from service.store.append.request import NewMessage
from service.store.document_chunks import Chunk, insert_chunks
from service.store.importing import ImportedMessage
from service.store.outbox import outbox
from service.store.tables import OutboxKind
from tests.search.library import Library
from tests.support.chat import Chat, new_id, new_message
from tests.support.failures import assert_fails, failure_of
from tests.support.servers import AsyncStub

SECRET = "xyzzy-7f3a9c-plugh"
SHA256 = hashlib.sha256(SECRET.encode()).hexdigest()

PROVOCATIONS: dict[Callable[[Scene], Awaitable[None]], tuple[str, ...]] = {}
WRITERS: dict[str, Callable[[Scene, str], Awaitable[None]]] = {}
NO_USER_DATA = {
    "alembic_version",
    "history_epoch",
    "schema_info",
    "search_indexes",
    "session_tombstones",
}
"""Tables that hold nothing of users but ids, so that a row in the log reveals nothing."""


class Scene(NamedTuple):
    """A server, a user with data, and a connection of the tests to the same database."""

    server: Server
    stub: AsyncStub
    chat: Chat
    connection: asyncpg.Connection

    async def write(self, function: Callable[..., Awaitable[Any]], *args: Any, **kw: Any) -> Any:
        """Run a function of the store on a connection, as an RPC does."""
        return await self.server.database.write(
            lambda connection: function(connection, *args, **kw),
            owner_id=self.chat.user_id,
            deadline=asyncio.get_running_loop().time() + 30,
        )

    async def session(self, count: int = 3) -> str:
        """Create a session with messages and return its id."""
        return await self.chat.start([secret_message() for _ in range(count)])

    @property
    def library(self) -> Library:
        return Library(self.chat)


def secret_message(content: str = SECRET, **fields: Any) -> message_pb2.Message:
    defaults: dict[str, Any] = {
        "parts": [{"data": {SECRET: SECRET}}],
        "metadata": {SECRET: SECRET},
        "author": SECRET,
        "feedback": {"comment": SECRET},
    }
    return new_message(content, **(defaults | fields))


def violates(*names: str) -> Callable[[Any], Any]:
    """Register a provocation of these constraints."""

    def register(function: Any) -> Any:
        PROVOCATIONS[function] = names
        return function

    return register


def writes(table: str) -> Callable[[Any], Any]:
    """Register a writer of a table."""

    def register(function: Any) -> Any:
        WRITERS[table] = function
        return function

    return register


# --- Unique constraints and primary keys.


@violates("users_pkey", "users_email_key", "users_external_id_key")
async def taken_values_of_users(scene: Scene) -> None:
    def values(**fields: Any) -> dict[str, Any]:
        unique = f"{SECRET}-{new_id()}"
        defaults = {"id": new_id(), "email": f"{unique}@example.com", "external_id": unique}
        return {"name": SECRET, "metadata": {SECRET: SECRET}, "fingerprint": b"1"} | (
            defaults | fields
        )

    taken, other = values(), values()
    for row in (taken, other):
        await scene.write(users.create, row)
    for key in ("id", "email", "external_id"):
        conflicting = values(**{key: taken[key]}, fingerprint=b"2")
        with pytest.raises(AlreadyExists):
            await scene.write(users.create, conflicting)
        if key == "id":
            continue  # The import accepts the user that is there, and no update changes an id.
        with pytest.raises(AlreadyExists):
            await scene.write(importing.import_user, conflicting)
        change = {key: taken[key].upper() if key == "email" else taken[key]}
        with pytest.raises(AlreadyExists):
            await scene.write(users.update, other["id"], change, "")


@violates("chat_sessions_pkey", "session_tombstones_pkey")
async def taken_ids_of_sessions(scene: Scene) -> None:
    derived_id = str(uuid5(UUID(scene.chat.user_id), new_id()))
    for _ in range(2):
        await scene.chat.create_session(id=derived_id, title=SECRET, summary=SECRET)
        await assert_fails(
            scene.chat.create_session(id=derived_id, title=f"other {SECRET}"), "ID_TAKEN"
        )
        other = await scene.session()
        await assert_fails(scene.chat.fork(other, 2, derived_id), "ID_TAKEN")
        await scene.chat.delete_session(derived_id)


@violates("chat_messages_pkey", "chat_messages_user_id_session_id_id_key")
async def taken_ids_of_messages(scene: Scene) -> None:
    message = secret_message()
    session_id = await scene.chat.start([message])
    other = secret_message(id=message.id, content=f"other {SECRET}")
    await assert_fails(scene.chat.append(session_id, [other]), "MESSAGE_ID_REUSED")
    for seq, imported in ((1, secret_message()), (2, message)):
        with pytest.raises(Exception, match="holds another message"):
            await import_message(scene, session_id, seq, imported)


@violates("documents_pkey", "documents_content_key")
async def taken_ids_and_content_of_documents(scene: Scene) -> None:
    library = scene.library
    source = f"{SECRET}/{new_id()}"
    first = await library.create([SECRET], source_uri=source, content_sha256=SHA256, title=SECRET)
    second = await library.create([SECRET], source_uri=f"{source}/2", content_sha256=SHA256)
    await assert_fails(library.create([SECRET], id=first.id, title=f"other {SECRET}"), "ID_TAKEN")
    await assert_fails(library.update(id=second.id, source_uri=source), "ID_TAKEN")


@violates("document_chunks_pkey")
async def taken_index_of_chunk(scene: Scene) -> None:
    document = await scene.library.create([SECRET, SECRET])
    await assert_fails(scene.library.append(document.id, 0, [f"other {SECRET}"]), "ID_TAKEN")
    await insert_chunk(scene, document.id, 1)


@violates("search_outbox_pkey")
async def taken_key_of_outbox(scene: Scene) -> None:
    for _ in range(2):
        await scene.write(outbox.enqueue, OutboxKind.SESSION, scene.chat.user_id, new_id())


# --- Foreign keys.


@violates("chat_sessions_user_id_fkey", "documents_user_id_fkey")
async def missing_users(scene: Scene) -> None:
    missing = Chat(scene.stub, new_id())
    await assert_fails(missing.create_session(title=SECRET), "USER_NOT_FOUND")
    await assert_fails(missing.start([secret_message()]), "USER_NOT_FOUND")
    await assert_fails(Library(missing).create([SECRET], title=SECRET), "USER_NOT_FOUND")
    values = {"user_id": missing.user_id, "id": new_id(), "title": SECRET, "fingerprint": b""}
    with pytest.raises(Exception, match="user not found"):
        await scene.write(importing.import_session, values)


@violates("chat_messages_user_id_session_id_fkey")
async def missing_sessions(scene: Scene) -> None:
    await assert_fails(scene.chat.append(new_id(), [secret_message()]), "SESSION_NOT_FOUND")
    with pytest.raises(Exception, match="session not found"):
        await import_message(scene, new_id(), 1, secret_message())


@violates("document_chunks_user_id_document_id_fkey")
async def missing_documents(scene: Scene) -> None:
    await assert_fails(scene.library.append(new_id(), 0, [SECRET]), "DOCUMENT_NOT_FOUND")
    await insert_chunk(scene, new_id(), 0)


# --- Checks.


@violates("chat_sessions_counts_check")
async def wrong_counts_of_sessions(scene: Scene) -> None:
    """Write to sessions whose counts are wrong already, as an interrupted deletion left them."""
    for count in (3, 0):
        session_id = await scene.session()
        await scene.chat.update_session(id=session_id, title=SECRET, summary=SECRET)
        await scene.connection.execute(
            "UPDATE chat_sessions SET message_count = $3 WHERE user_id = $1 AND id = $2",
            scene.chat.user_id,
            session_id,
            count,
        )
        if count:
            await scene.connection.execute(
                "DELETE FROM chat_messages WHERE user_id = $1 AND session_id = $2 AND seq > 1",
                scene.chat.user_id,
                session_id,
            )
            await import_message(scene, session_id, 2, secret_message())
            continue
        first, *_ = await scene.chat.all(session_id)
        await scene.chat.delete(session_id, first.id)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "MESSAGES_PER_DELETE", 1)
            await scene.chat.delete_session(session_id)


@violates("chat_messages_seq_check")
async def impossible_seqs(scene: Scene) -> None:
    session_id = await scene.session()
    for seq in (0, -1):
        with pytest.raises(ValueError, match="seq"):
            await import_message(scene, session_id, seq, secret_message())


@violates("document_chunks_chunk_index_check")
async def impossible_indexes_of_chunks(scene: Scene) -> None:
    document = await scene.library.create([SECRET])
    await failure_of(scene.library.append(document.id, -1, [f"other {SECRET}"]))
    with pytest.raises(ValueError, match="index"):
        await scene.write(insert_chunks, scene.chat.user_id, document.id, -1, [Chunk(SECRET, None)])


# --- Missing values.


@writes("users")
async def write_user(scene: Scene, column: str) -> None:
    values = {"id": new_id(), "name": SECRET, "metadata": {SECRET: SECRET}, "fingerprint": b""}
    missing = {**values, column: None}
    for create in (users.create, importing.import_user):
        await fails_for(column, scene, create, missing)
    user_id = scene.chat.user_id
    change = {"name": SECRET, column: None}
    await fails_for(column, scene, users.update, user_id, change, "")


@writes("chat_sessions")
async def write_session(scene: Scene, column: str) -> None:
    user_id = scene.chat.user_id
    values = {"user_id": user_id, "id": new_id(), "title": SECRET, "summary": SECRET}
    missing = {**values, "metadata": {SECRET: SECRET}, "fingerprint": b"", column: None}
    await fails_for(column, scene, sessions.create, missing)
    await fails_for(column, scene, importing.import_session, missing)
    session_id = await scene.session()
    change = {"title": SECRET, column: None}
    await fails_for(column, scene, sessions.update, user_id, session_id, change, "")


@writes("chat_messages")
async def write_message(scene: Scene, column: str) -> None:
    session_id = await scene.session()
    stored, *_ = await scene.chat.all(session_id)
    user_id = scene.chat.user_id
    if column not in ("size", "token_estimate", "revision", "updated_at"):  # It sets these itself.
        change = {"author": SECRET, column: None}
        await fails_for(
            column, scene, messages.update, user_id, session_id, stored.id, change, "", measure
        )
    if column in NewMessage._fields:
        missing: dict[str, Any] = {column: None}
        imported = ImportedMessage(4, 1, 1, new_row(secret_message())._replace(**missing))
        await fails_for(
            column,
            scene,
            importing.import_messages,
            user_id,
            session_id,
            [imported],
            search_enabled=False,
        )


async def measure(_row: object) -> int:
    """Measure a message for an update."""
    return 1


@writes("documents")
async def write_document(scene: Scene, column: str) -> None:
    user_id = scene.chat.user_id
    values: dict[str, Any] = {"user_id": user_id, "id": new_id(), "title": SECRET}
    values |= {
        "source_uri": SECRET,
        "content_sha256": None,
        "metadata": {SECRET: SECRET},
        "fingerprint": b"",
    }
    missing = {**values, column: None}
    if column != "chunk_count":  # It is counted.
        await fails_for(column, scene, documents.create, missing, [], search_enabled=False)
    document = await scene.library.create([SECRET], title=SECRET, source_uri=SECRET)
    change = {"title": SECRET, column: None}
    await fails_for(column, scene, documents.update, [user_id], document.id, change, "")


@writes("document_chunks")
async def write_chunk(scene: Scene, column: str) -> None:
    document = await scene.library.create([SECRET])
    arguments = {
        "user_id": scene.chat.user_id,
        "document_id": document.id,
        "chunk_index": 5,
        "text": SECRET,
        column: None,
    }
    text: Any = arguments["text"]
    with pytest.raises((ValueError, TypeError)):
        await scene.write(
            insert_chunks,
            arguments["user_id"],
            arguments["document_id"],
            arguments["chunk_index"],
            [Chunk(text, SECRET.encode())],
        )


@writes("search_outbox")
async def write_outbox(scene: Scene, column: str) -> None:
    """The table holds ids, numbers and constant texts, which may be logged."""
    if column in ("user_id", "entity_id", "since", "through", "wipe"):
        fields: dict[str, Any] = {"user_id": scene.chat.user_id, "entity_id": new_id()}
        fields |= {"wipe": True, column: None}
        with suppress(Exception):
            await scene.write(outbox.enqueue, OutboxKind.SESSION, **fields)


async def fails_for(
    column: str, scene: Scene, function: Callable[..., Awaitable[Any]], *args: Any, **kw: Any
) -> None:
    """Assert that the store refuses a missing value before PostgreSQL sees it."""
    with pytest.raises((ValueError, TypeError), match=rf"\b{column}\b"):
        await scene.write(function, *args, **kw)


def new_row(message: message_pb2.Message) -> NewMessage:
    """Return the row of a message as it is imported."""
    return convert.new_message(message, message.id, "message")


async def import_message(
    scene: Scene, session_id: str, seq: int, message: message_pb2.Message
) -> None:
    await scene.write(
        importing.import_messages,
        scene.chat.user_id,
        session_id,
        [ImportedMessage(seq, 1, 1, new_row(message))],
        search_enabled=False,
    )


async def insert_chunk(scene: Scene, document_id: str, chunk_index: int) -> None:
    """Insert a chunk whose key is taken, or whose document is missing."""
    with pytest.raises(Exception, match=r"unique|foreign key"):
        await scene.write(
            insert_chunks, scene.chat.user_id, document_id, chunk_index, [Chunk(SECRET, None)]
        )
