"""DeleteUser leaves no content of the user anywhere, and the audit trail records it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chathistory.v1 import document_pb2, export_pb2, message_pb2, search_pb2, session_pb2, user_pb2

from tests.search.waits import wait_until_searchable
from tests.support import issuer
from tests.support.chat import Chat, new_id, new_message
from tests.support.cluster import fetch
from tests.support.failures import failure_of
from tests.support.issuer import bearer_metadata, service_token, token
from tests.support.servers import AsyncStub, connected, serving
from tests.support.untyped_messages import Document, Part, Session, User

MARKER = "xyzzy-7f3a9c-plugh"


async def dump(database_url: str) -> str:
    """Return every row of every table, as text."""
    tables = await fetch(
        database_url,
        "SELECT format('%I.%I', table_schema, table_name) FROM information_schema.tables "
        "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
        " AND table_type = 'BASE TABLE'",
    )
    rows = []
    for (name,) in tables:
        rows += [
            f"{name} {row[0]}"
            for row in await fetch(database_url, f"SELECT t::text FROM {name} AS t")
        ]
    return "\n".join(rows)


def without_tombstones(rows: str) -> str:
    """Remove the tombstones of sessions, which hold ids and a time for 24 hours."""
    tombstone = r"^chathistory\.session_tombstones \(\S+,\S+,[^,]+\)$"
    return re.sub(tombstone, "", rows, flags=re.MULTILINE)


async def create_marked_user(stub: AsyncStub, **call: Any) -> Chat:
    """Create a user with the marker in every text field."""
    user = User(
        name=MARKER, external_id=MARKER, email=f"{MARKER}@example.com", metadata={MARKER: MARKER}
    )
    created = (await stub.CreateUser(user_pb2.CreateUserRequest(user=user), **call)).user
    parts = [
        Part(tool_call={"id": MARKER, "name": MARKER, "arguments": MARKER}),
        Part(data={MARKER: [MARKER]}),
    ]
    message = new_message(
        MARKER, parts=parts, author=MARKER, metadata={MARKER: MARKER}, feedback={"comment": MARKER}
    )
    session = Session(title=MARKER, summary=MARKER, metadata={MARKER: MARKER})
    append = message_pb2.AppendMessagesRequest(
        user_id=created.id, messages=[message, new_message(f"gone {MARKER}")], session=session
    )
    stored = await stub.AppendMessages(append, **call)
    deletion = message_pb2.DeleteMessageRequest(
        user_id=created.id, session_id=stored.session_id, message_id=append.messages[1].id
    )
    await stub.DeleteMessage(deletion, **call)
    fork = session_pb2.ForkSessionRequest(
        user_id=created.id, session_id=stored.session_id, through_seq=2
    )
    await stub.ForkSession(fork, **call)
    document = Document(
        title=MARKER, source_uri=f"https://example.com/{MARKER}", metadata={MARKER: MARKER}
    )
    create = document_pb2.CreateDocumentRequest(user_id=created.id, document=document)
    create.chunks.add(text=MARKER)
    await stub.CreateDocument(create, **call)
    return Chat(stub, created.id)


async def provoke(chat: Chat, **call: Any) -> None:
    """Cause errors about the marker: rejected content must not reach the log either."""
    for request in (
        session_pb2.UpdateSessionRequest(
            user_id=chat.user_id, session=Session(id=new_id(), title=MARKER)
        ),
        session_pb2.UpdateSessionRequest(user_id=chat.user_id, session=Session(title=MARKER * 50)),
    ):
        await failure_of(chat.stub.UpdateSession(request, **call))
    taken = user_pb2.CreateUserRequest(user=User(external_id=MARKER))
    await failure_of(chat.stub.CreateUser(taken, **call))


async def test_deleted_user_leaves_nothing_in_database_or_log(
    start_process: Callable[..., Any], database_url: str
) -> None:
    server = await start_process(CHAT_HISTORY_LOG_LEVEL="debug", CHAT_HISTORY_SEARCH="off")
    async with connected(server.address) as stub:
        chat = await create_marked_user(stub)
        await provoke(chat)
        assert MARKER in await dump(database_url)
        async for _ in stub.ExportUserData(export_pb2.ExportUserDataRequest(user_id=chat.user_id)):
            pass
        deleted = await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
        assert (
            deleted.session_count,
            deleted.message_count,
            deleted.document_count,
            deleted.chunk_count,
        ) == (
            2,
            2,
            1,
            1,
        )
        left = await dump(database_url)
        assert MARKER not in left
        assert chat.user_id not in without_tombstones(left)
    await server.stop()
    log = server.log.read_text()
    assert MARKER not in log
    assert "erase" in log


def trail(log: Path) -> list[dict[str, Any]]:
    """Return the audit lines of a log, without their times."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [
        {name: value for name, value in line.items() if name not in ("timestamp", "level", "event")}
        for line in lines
        if line.get("event") == "audit"
    ]


async def test_audit_trail_records_acts_denials_exports_and_erasures(
    start_process: Callable[..., Any],
) -> None:
    server = await start_process(
        CHAT_HISTORY_AUTH="jwt",
        CHAT_HISTORY_JWT_KEY=issuer.SECRET,
        CHAT_HISTORY_JWT_AUDIENCE=issuer.AUDIENCE,
        CHAT_HISTORY_LOG_LEVEL="error",
        CHAT_HISTORY_SEARCH="off",
    )
    async with connected(server.address) as stub:
        shown = bearer_metadata(service_token("backend"))
        created = (
            await stub.CreateUser(user_pb2.CreateUserRequest(user=User()), metadata=shown)
        ).user
        append = message_pb2.AppendMessagesRequest(
            user_id=created.id, messages=[new_message(MARKER)]
        )
        stored = await stub.AppendMessages(append, metadata=shown)
        for _ in range(4):
            await stub.AppendMessages(append, metadata=shown)
        mine = bearer_metadata(token(created.id))
        await stub.AppendMessages(append, metadata=mine)
        for _ in range(2):
            await failure_of(
                stub.ListSessions(session_pb2.ListSessionsRequest(user_id=new_id()), metadata=mine)
            )
        about: dict[str, Any] = {"user_id": created.id, "session_id": stored.session_id}
        await stub.DeleteSession(session_pb2.DeleteSessionRequest(**about), metadata=mine)
        await failure_of(
            stub.DeleteSession(session_pb2.DeleteSessionRequest(**about), metadata=mine)
        )
        async for _ in stub.ExportUserData(export_pb2.ExportUserDataRequest(), metadata=mine):
            pass
        await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=created.id), metadata=shown)
    await server.stop()
    lines = trail(server.log)
    service = {"caller": "service", "subject": "backend"}
    user = {"caller": "user", "caller_user_id": created.id, "subject": created.id}
    denied = lines.pop(2)
    assert (denied["act"], denied["outcome"], denied["caller_user_id"]) == (
        "denied",
        "USER_MISMATCH",
        created.id,
    )
    assert lines == [
        service | {"act": "act", "method": "CreateUser", "outcome": "allowed"},
        service
        | {"act": "act", "method": "AppendMessages", "outcome": "allowed", "user_id": created.id},
        user | {"act": "erase", "method": "DeleteSession", "outcome": "OK"} | about,
        user | {"act": "erase", "method": "DeleteSession", "outcome": "SESSION_NOT_FOUND"} | about,
        user | {"act": "export", "method": "ExportUserData", "outcome": "OK"},
        service | {"act": "erase", "method": "DeleteUser", "outcome": "OK", "user_id": created.id},
    ]
    assert MARKER not in server.log.read_text()


async def wait_until_indexed(database_url: str) -> None:
    """Wait until nothing is enqueued and no rebuild runs: its cursor is a user's id."""
    async with asyncio.timeout(60):
        while await fetch(
            database_url,
            "SELECT FROM search_outbox UNION ALL"
            " SELECT FROM search_indexes WHERE building IS NOT NULL",
        ):
            await asyncio.sleep(0.1)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_deleted_user_leaves_nothing_in_the_search_index(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        chat = await create_marked_user(stub)
        search = message_pb2.SearchMessagesRequest(
            user_id=chat.user_id, query=MARKER, mode=message_pb2.SEARCH_MODE_SEMANTIC
        )
        async with asyncio.timeout(60):
            while not (await stub.SearchMessages(search)).hits:
                await asyncio.sleep(0.1)
        await provoke(chat)
        await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
        await wait_until_indexed(database_url)
        assert MARKER not in (left := await dump(database_url))
        assert chat.user_id not in without_tombstones(left)
    files = files_in(tmp_path)
    assert any("qdrant" in str(path) for path in files)
    for path in files:
        content = path.read_bytes()
        assert MARKER.encode() not in content, path
        assert chat.user_id.encode() not in content, path


async def test_finished_rebuild_keeps_no_user_id(database_url: str, tmp_path: Path) -> None:
    """The cursor of a rebuild is a user's id, which is removed at its end."""
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        chat = await create_marked_user(stub)
        async for _ in stub.RebuildSearchIndex(search_pb2.RebuildSearchIndexRequest()):
            pass
        await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
        await wait_until_indexed(database_url)
        assert chat.user_id not in without_tombstones(await dump(database_url))
