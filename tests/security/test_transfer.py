"""Export and import: a user's data, with times and order, and the tables of another chatbot."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import document_pb2, export_pb2, session_pb2, user_pb2

from service.portability.exporter import export_user
from service.portability.importer import MAX_BATCH_ITEMS, import_lines
from service.portability.transfer import ItemCounts, TransferError
from service.server import Server
from service.store.db.dsn import parse
from tests.support.chat import ASSISTANT, TOOL, Chat, new_id, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails
from tests.support.history import read_history
from tests.support.servers import AsyncStub
from tests.support.untyped_messages import Document, Part, Session, User


async def exported(stub: AsyncStub, user_id: str) -> list[export_pb2.ExportUserDataResponse]:
    return [
        item
        async for item in stub.ExportUserData(export_pb2.ExportUserDataRequest(user_id=user_id))
    ]


async def export_lines(database_url: str, user_id: str) -> str:
    file = io.StringIO()
    await export_user(parse(database_url), user_id, file.write, lambda: None)
    return file.getvalue()


async def store_lines(database_url: str, lines: str, user_id: str | None = None) -> ItemCounts:
    return await import_lines(
        parse(database_url),
        io.BytesIO(lines.encode()),
        user_id=user_id,
        search_enabled=False,
        on_line=lambda _byte_count: None,
    )


async def create_full_user(stub: AsyncStub) -> Chat:
    """Create a user with every kind of data."""
    user = User(
        email="ada@example.com",
        external_id="ada",
        name="Ada ✨",
        metadata={"plan": "pro", "n": [1, None]},
    )
    created = (await stub.CreateUser(user_pb2.CreateUserRequest(user=user))).user
    chat = Chat(stub, created.id)
    call = Part(tool_call={"id": "c1", "name": "weather", "arguments": '{"city": "Ulm"}'})
    result = Part(tool_result={"tool_call_id": "c1", "content": "sunny", "is_error": False})
    messages = [
        new_message(
            "hello\nworld ' \" \\ \u2028 \U0001f600",
            author="Ada",
            metadata={"a": {"b": [True, 1.5, "x"]}},
        ),
        new_message("", ASSISTANT, parts=[call], token_count=0),
        new_message("", TOOL, parts=[result, Part(data={"k": "v"})]),
        new_message("sunny", ASSISTANT, feedback={"score": -0.5, "comment": "meh"}, token_count=7),
    ]
    first = await chat.start(messages, session=Session(title="Weather", metadata={"color": "red"}))
    deleted = [new_message("to be deleted") for _ in range(2)]
    await chat.append(first, [deleted[0], *new_messages(3)])
    await chat.append(first, [deleted[1]])
    for message in deleted:
        await chat.delete(first, message.id)
    await chat.update(first, messages[3].id, ["content"], content="sunny, mostly")
    await chat.update_session(
        ["summary", "summarized_through_seq"],
        id=first,
        summary="It was sunny.",
        summarized_through_seq=2,
    )
    await chat.fork(first, 3)
    archived = await chat.start(new_messages(100, "long"))
    for _ in range(2):
        await chat.append(archived, new_messages(75, "longer"))
    await chat.update_session(["state"], id=archived, state=session_pb2.SESSION_STATE_ARCHIVED)
    await chat.create_session(title="empty")
    await create_document(
        chat,
        [f"chunk {n} ✨" for n in range(25)],
        title="A book",
        source_uri="https://example.com/book",
    )
    await create_document(
        chat, [], title="Nothing", metadata={"k": ["v"]}, content_sha256="ab" * 32
    )
    return chat


async def create_document(chat: Chat, chunks: list[str], **fields: Any) -> None:
    request = document_pb2.CreateDocumentRequest(user_id=chat.user_id, document=Document(**fields))
    for n, text in enumerate(chunks):
        request.chunks.add(text=text, vector=[0.5, n] if n % 2 else [])
    await chat.stub.CreateDocument(request)


def comparable(items: list[export_pb2.ExportUserDataResponse]) -> list[Any]:
    """Return items without the fields that differ between stored copies: owners and etags."""
    for item in items:
        resource = getattr(item, item.WhichOneof("item") or "")
        if not item.HasField("chunk"):
            resource.ClearField("etag")
        if item.HasField("session"):
            item.session.ClearField("user_id")
        if item.HasField("document"):
            item.document.ClearField("user_id")
            item.document.ClearField("update_time")  # Set by its last chunk, at the import.
        if item.HasField("user"):
            item.user.ClearField("id")
    return items


async def test_export_contains_all_data_in_order(stub: AsyncStub) -> None:
    chat = await create_full_user(stub)
    await create_other_user(stub)
    items = await exported(stub, chat.user_id)
    assert items[0].user == (await stub.GetUser(user_pb2.GetUserRequest(user_id=chat.user_id))).user
    sessions = [item.session for item in items if item.HasField("session")]
    assert sessions == sorted((await chat.list_sessions()).sessions, key=lambda session: session.id)
    for session in sessions:
        messages = [
            item.message
            for item in items
            if item.HasField("message") and item.message.session_id == session.id
        ]
        assert messages == await chat.all(session.id)
    kinds = [item.WhichOneof("item") for item in items]
    assert kinds[:2] == ["user", "session"]


async def create_other_user(stub: AsyncStub) -> None:
    other = await Chat.of_new_user(stub)
    await other.start("of another user")


async def test_export_can_be_imported_as_another_user(stub: AsyncStub, database_url: str) -> None:
    chat = await create_full_user(stub)
    before = comparable(await exported(stub, chat.user_id))
    lines = await export_lines(database_url, chat.user_id)
    histories = {
        session.id: await read_history(database_url, chat.user_id, session.id)
        for session in (await chat.list_sessions()).sessions
    }
    await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
    new_user_id = new_id()
    counts = await store_lines(database_url, lines, new_user_id)
    assert str(counts) == "1 users, 4 sessions, 260 messages, 2 documents, 25 chunks"
    assert comparable(await exported(stub, new_user_id)) == before
    for session_id, old in histories.items():
        now = await read_history(database_url, new_user_id, session_id)
        assert now is not None
        assert old is not None
        now.check()
        assert (now.last_seq, now.message_count, now.state) == (
            old.last_seq,
            old.message_count,
            old.state,
        )
    # The conversation continues after its last seq.
    again = Chat(stub, new_user_id)
    session_id = next(iter(histories))
    await again.update_session(["state"], id=session_id, state=session_pb2.SESSION_STATE_ACTIVE)
    end = (await again.get_session(session_id)).last_seq
    assert [message.seq for message in (await again.append(session_id, "on we go")).messages] == [
        end + 1
    ]


async def test_repeated_import_continues_after_the_line_that_failed(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await create_full_user(stub)
    before = comparable(await exported(stub, chat.user_id))
    lines = await export_lines(database_url, chat.user_id)
    await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
    all_lines = [line + "\n" for line in lines.split("\n")[:-1]]
    with pytest.raises(TransferError, match=f"line {len(all_lines) // 2 + 1} is not valid JSON"):
        await store_lines(
            database_url, "".join(all_lines[: len(all_lines) // 2]) + '{"message": {"con'
        )
    total = 0
    for part in (all_lines[: len(all_lines) // 3], all_lines):
        total += (await store_lines(database_url, "".join(part))).new_messages
    assert comparable(await exported(stub, chat.user_id)) == before
    assert (await store_lines(database_url, lines)).new_messages == 0
    assert comparable(await exported(stub, chat.user_id)) == before


async def test_import_into_a_session_with_other_messages_fails(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await create_full_user(stub)
    lines = await export_lines(database_url, chat.user_id)
    await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
    other = await Chat.of_new_user(stub)
    session_id = next(
        json.loads(line)["session"]["id"]
        for line in lines.split("\n")[:-1]
        if "session" in json.loads(line)
    )
    await other.append(session_id, "mine", create_if_missing=True)
    with pytest.raises(TransferError, match="not written by this import"):
        await store_lines(database_url, lines, other.user_id)
    assert [message.content for message in await other.all(session_id)] == ["mine"]


async def test_import_with_a_taken_seq_before_an_invalid_line_reports_the_taken_seq(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await Chat.of_new_user(stub)
    session_id = new_id()
    session = json.dumps({"session": {"id": session_id}})
    stored, *others = (
        json.dumps({"message": {"id": new_id(), "seq": seq, "role": "user", "content": content}})
        for seq, content in ((1, "stored"), (1, "other"), (2, "after it"))
    )
    await store_lines(database_url, f"{session}\n{stored}\n", chat.user_id)
    with pytest.raises(TransferError, match=rf"^at line 2: .* {session_id} .* seq 1, "):
        await store_lines(database_url, "\n".join([session, *others, '{"message": ']), chat.user_id)
    assert [message.content for message in await chat.all(session_id)] == ["stored"]


async def test_import_fails_when_another_user_has_a_unique_value(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await create_full_user(stub)
    lines = await export_lines(database_url, chat.user_id)
    with pytest.raises(TransferError, match="another user has this"):
        await store_lines(database_url, lines, new_id())


async def test_export_of_an_unknown_user_fails(stub: AsyncStub, chat: Chat) -> None:
    await assert_fails(exported(stub, new_id()), "USER_NOT_FOUND")


OLD_TABLES = """
CREATE SCHEMA old;
CREATE TABLE old.users (id serial PRIMARY KEY, email text, created_at timestamptz DEFAULT now());
CREATE TABLE old.chat_sessions (
    id serial PRIMARY KEY, user_id int, title text, created_at timestamp, updated_at timestamp
);
CREATE TABLE old.chat_messages (
    id serial PRIMARY KEY, session_id int, role text, content text, created_at timestamp
);
INSERT INTO old.users (email) VALUES ('old@example.com'), (NULL);
INSERT INTO old.chat_sessions (user_id, title, created_at, updated_at)
    SELECT u, 'chat ' || s, '2021-03-04 05:06:07.891', '2021-03-05'
    FROM generate_series(1, 2) u, generate_series(1, 3) s;
INSERT INTO old.chat_messages (session_id, role, content, created_at)
    SELECT s, CASE WHEN m % 2 = 0 THEN 'assistant' ELSE 'user' END,
           E'line\\n"' || m || E'" \\\\ ' || s,
           timestamp '2021-03-04 05:06:07.891' + m * interval '1 second'
    FROM generate_series(300, 1, -1) m, generate_series(1, 6) s;
"""


def documented_query() -> str:
    """Return the query in the documentation, for tables in the schema `old`."""
    page = (
        Path(__file__).resolve().parents[2] / "docs" / "how-to" / "import-export.md"
    ).read_text()
    return re.sub(
        r"\b(FROM|JOIN) (\w)", r"\1 old.\2", page.partition("```sql\n")[2].partition("```")[0]
    )


async def test_import_of_the_tables_of_another_chatbot(stub: AsyncStub, database_url: str) -> None:
    for statement in filter(str.strip, OLD_TABLES.split(";\n")):
        await fetch(database_url, statement)
    lines = "".join(row[0] + "\n" for row in await fetch(database_url, documented_query()))
    counts = await store_lines(database_url, lines)
    assert str(counts) == "2 users, 6 sessions, 1800 messages"
    assert (await store_lines(database_url, lines)).new_messages == 0
    user = (await stub.GetUser(user_pb2.GetUserRequest(external_id="1"))).user
    assert user.email == "old@example.com"
    chat = Chat(stub, user.id)
    sessions = (await chat.list_sessions()).sessions
    assert sorted(session.title for session in sessions) == ["chat 1", "chat 2", "chat 3"]
    assert {session.create_time.ToJsonString() for session in sessions} == {
        "2021-03-04T05:06:07.891Z"
    }
    messages = await chat.all(sessions[0].id)
    assert [message.seq for message in messages] == list(range(1, 301))
    assert messages[1].role == ASSISTANT
    assert messages[0].content.startswith('line\n"1" \\ ')
    assert messages[9].create_time.ToJsonString() == "2021-03-04T05:06:17.891Z"
    stored = await read_history(database_url, user.id, sessions[0].id)
    assert stored is not None
    stored.check()


@pytest.mark.parametrize("ahead", [0, 600])
@pytest.mark.parametrize("before", [-1e-6, 0, 1e-6, 60])
async def test_an_imported_session_accepts_appends_whatever_its_times(
    stub: AsyncStub, database_url: str, ahead: float, before: float
) -> None:
    """Also if it was updated before its creation, or if its times are in the future."""
    chat = await Chat.of_new_user(stub)
    created = datetime.now(UTC) + timedelta(seconds=ahead)
    updated = created - timedelta(seconds=before)
    body = {"create_time": created.isoformat(), "update_time": updated.isoformat()}
    for last_seq, messages in (
        (0, []),
        (1, [{"role": "user", "content": "old", "create_time": created.isoformat()}]),
    ):
        session_id = new_id()
        lines = [
            {"session": body | {"id": session_id, "last_seq": last_seq}},
            *({"message": message} for message in messages),
        ]
        await store_lines(database_url, "\n".join(map(json.dumps, lines)), chat.user_id)
        reply = await chat.append(session_id, "on we go")
        assert [message.seq for message in reply.messages] == [last_seq + 1]
        assert not reply.session_created
        again = await chat.append(session_id, "and on", create_if_missing=True)
        assert not again.session_created
        stored = await read_history(database_url, chat.user_id, session_id)
        assert stored is not None
        stored.check()


async def test_imported_chunks_without_index_are_numbered_across_batches(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await Chat.of_new_user(stub)
    texts = [f"chunk {n}" for n in range(MAX_BATCH_ITEMS + 1)]
    document_id = new_id()
    lines = [
        {"document": {"id": document_id}},
        *({"chunk": {"text": text}} for text in texts),
    ]
    for _ in range(2):
        await store_lines(database_url, "\n".join(map(json.dumps, lines)), chat.user_id)
    reply = await stub.ListDocumentChunks(
        document_pb2.ListDocumentChunksRequest(
            user_id=chat.user_id, document_id=document_id, page_size=1000
        )
    )
    assert [(chunk.index, chunk.text) for chunk in reply.chunks] == list(enumerate(texts))


async def test_import_of_a_chunk_at_a_taken_index_names_its_line(
    stub: AsyncStub, database_url: str
) -> None:
    chat = await Chat.of_new_user(stub)
    document = json.dumps({"document": {"id": new_id()}})
    first, stored, other = (
        json.dumps({"chunk": {"text": text}}) for text in ("first", "stored", "other")
    )
    await store_lines(database_url, f"{document}\n{first}\n{stored}\n", chat.user_id)
    with pytest.raises(TransferError, match=r"^at line 3: another chunk is stored at this index"):
        await store_lines(database_url, f"{document}\n{first}\n{other}\n", chat.user_id)


USER = '{"user": {"id": "1"}}'
SESSION = '{"session": {"id": "1"}}'
DOCUMENT, DOCUMENT_2 = '{"document": {"id": "1"}}', '{"document": {"id": "2"}}'
CHUNK, CHUNK_2 = '{"chunk": {"text": "x"}}', '{"chunk": {"text": "x", "index": 2}}'
BAD_LINES = {
    "[]": "line 1 is not an item",
    '{"user": {}}': "has no id",
    '{"user": {"id": "1", "email": "x"}}': "email: ",
    '{"user": {"id": "1", "nick": "x"}}': 'no field named "nick"',
    SESSION: "comes before its user",
    '{"message": {"content": "x"}}': "comes before its session",
    f'{USER}\n{{"session": {{}}}}': "line 2 has no id",
    f'{USER}\n{SESSION}\n{{"message": {{"role": "nobody"}}}}': "line 3 is not a valid message",
    f'{USER}\n{SESSION}\n{{"message": {{"role": "user", "content": "a\\u0000"}}}}': "content: ",
    f'{USER}\n{SESSION}\n{{"message": {{"role": "user", "create_time": "soon"}}}}': (
        "line 3 is not a valid message"
    ),
    f'{USER}\n{SESSION}\n{{"message": {{"role": "user", "session_id": "2"}}}}': (
        "not a message of the session"
    ),
    f"{USER}\n{SESSION}\n" + '{"message": {"role": "user", "seq": 2}}\n' * 2: (
        "line 4 has seq 2, which is not after"
    ),
    f'{USER}\n{{"chunk": {{"text": "x"}}}}': "comes before its document",
    f'{USER}\n{DOCUMENT}\n{SESSION}\n{{"chunk": {{"text": "x", "index": 1}}}}': (
        "line 4 is a chunk that comes before its document"
    ),
    f"{USER}\n{DOCUMENT}\n{CHUNK_2}": "line 3 has index 2, and the next chunk's index is 0",
    f"{USER}\n{DOCUMENT}\n{CHUNK}\n{CHUNK_2}": (
        "line 4 has index 2, and the next chunk's index is 1"
    ),
    f"{USER}\n{DOCUMENT}\n{CHUNK}\n{CHUNK}\n{CHUNK_2}\n{CHUNK_2}": (
        "line 6 has index 2, and the next chunk's index is 3"
    ),
    f"{USER}\n{DOCUMENT}\n{CHUNK}\n{DOCUMENT_2}\n{CHUNK}\n{CHUNK_2}": (
        "line 6 has index 2, and the next chunk's index is 1"
    ),
    f'{USER}\n{DOCUMENT}\n{{"chunk": {{"text": "x", "index": "first"}}}}': (
        "line 3 is not a valid chunk"
    ),
    '{"user": {"id": "1", "create_time": "2999-01-01"}}': "has a time in the future",
    f'{USER}\n{{"session": {{"id": "1", "last_seq": "9223372036854775807"}}}}': (
        "line 2 has a seq above"
    ),
    f'{USER}\n{SESSION}\n{{"message": {{"role": "user", "seq": 1e15}}}}': "line 3 has a seq above",
    '{"user": ' + '{"id":' * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize("lines", BAD_LINES)
async def test_invalid_line_is_reported_with_its_number(
    server: Server, database_url: str, lines: str
) -> None:
    with pytest.raises(TransferError, match=BAD_LINES[lines]):
        await store_lines(database_url, lines)
