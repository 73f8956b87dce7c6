"""Pages of large rows and long runs of tombstones: bounded reads, complete and correct pages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from chathistory.v1 import document_pb2, message_pb2, user_pb2

from service.rpc.page_reads import FIRST_LARGE_STEP
from service.server import Server
from service.store.bounded_reads import FIRST_READ_ROWS, HOT_READ_BYTES
from service.store.message_pages import MAX_SCANNED
from service.store.rows import MAX_PAGE_BYTES
from service.store.tables import SCHEMA
from tests.support.chat import ASSISTANT, SYSTEM, TOOL, Chat, new_id, new_message, new_messages
from tests.support.cluster import connected_to, fetch
from tests.support.failures import assert_fails, assert_field_violations
from tests.support.plans import SentStatement, explain, recording

ASC, DESC = message_pb2.MESSAGE_ORDER_ASC, message_pb2.MESSAGE_ORDER_DESC
FIXED_ROW_BYTES = 512
"""Bytes of a message's ids, times and numbers that its size does not count."""


def is_expensive(sent: Sequence[SentStatement]) -> bool:
    return any("set_config" in statement.sql for statement in sent)


def reads_of(sent: Sequence[SentStatement], table: str) -> list[SentStatement]:
    return [statement for statement in sent if table in statement.sql]


async def fetched_bytes(url: str, statement: SentStatement) -> int:
    """Run a statement again, and return the bytes of the text in its result."""
    async with connected_to(url) as connection:
        records = await connection.fetch(statement.sql, *statement.args)
    return sum(
        len(value.encode() if isinstance(value, str) else value)
        for record in records
        for value in record.values()
        if isinstance(value, str | bytes)
    )


async def insert_tombstones(url: str, chat: Chat, session_id: str, count: int) -> None:
    """Append `count` deleted messages to a session, by SQL."""
    await fetch(
        url,
        """
        WITH s AS (
            UPDATE chat_sessions SET last_seq = last_seq + $3::int
            WHERE user_id = $1 AND id = $2 RETURNING last_seq - $3::int AS last_seq
        )
        INSERT INTO chat_messages (user_id, session_id, seq, id, role, content, token_estimate,
                                   size, fingerprint, deleted_at)
        SELECT $1, $2, s.last_seq + n, gen_random_uuid(), 1, '', 0, 0, '', now()
        FROM s, generate_series(1, $3::int) AS n
        """,
        chat.user_id,
        session_id,
        count,
    )


# --- Bytes.


async def test_page_of_small_messages_is_one_hot_statement(server: Server, chat: Chat) -> None:
    session_id = await chat.start(new_messages(40))
    await chat.page(session_id)  # The first list reads the key of page tokens.
    for call in (
        lambda: chat.page(session_id, page_size=20),
        lambda: chat.page(session_id, page_size=20, order=DESC),
        lambda: chat.page(session_id),
        lambda: chat.context(session_id, max_messages=20),
        lambda: chat.context(session_id),
    ):
        async with recording(server) as sent:
            await call()
        assert len(reads_of(sent, "chat_messages")) == 1


@pytest.mark.parametrize("order", [ASC, DESC])
async def test_hot_statement_reads_no_more_than_its_bound_and_the_page_is_full(
    server: Server, chat: Chat, database_url: str, order: message_pb2.MessageOrder.ValueType
) -> None:
    session_id = (await chat.create_session()).id
    # The first message of either order is larger than the bound of a hot statement.
    huge = new_message("x" * 200_000, parts=[{"text": "x" * 200_000}])
    await chat.append(session_id, [huge])
    for _ in range(20):
        await chat.append(session_id, [new_message("y" * 200_000), new_message("small")])
    huge.id = new_id()
    await chat.append(session_id, [huge])
    async with recording(server) as sent:
        page = await chat.page(session_id, order=order)
    first, *rest = reads_of(sent, "chat_messages")
    assert await fetched_bytes(database_url, first) <= HOT_READ_BYTES
    assert is_expensive(sent)
    for statement in rest:
        assert await fetched_bytes(database_url, statement) <= MAX_PAGE_BYTES
    sizes = [message.ByteSize() for message in page.messages]
    assert MAX_PAGE_BYTES - 200_200 < sum(sizes) <= MAX_PAGE_BYTES
    seqs = [message.seq for message in await chat.all(session_id, order=order)]
    assert sorted(seqs) == list(range(1, 43))
    assert seqs == sorted(seqs, reverse=order == DESC)


async def test_large_context_reads_only_the_texts_that_it_returns(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = (await chat.create_session()).id
    await chat.append(session_id, [new_message("be kind", SYSTEM)])
    call = new_message("", ASSISTANT, parts=[{"tool_call": {"id": "a" * 256, "name": "f"}}])
    await chat.append(session_id, [call])
    for _ in range(20):
        result = {"tool_result": {"tool_call_id": "a" * 256, "content": "x" * 250_000}}
        await chat.append(session_id, [new_message("", TOOL, parts=[result])])
    async with recording(server) as sent:
        reply = await chat.context(session_id)
    # The call and the beginning of its results, and the leading SYSTEM message that fits, too.
    assert [message.seq for message in reply.messages] == list(range(1, 15))
    statements = reads_of(sent, "chat_messages")
    sizes = [await fetched_bytes(database_url, statement) for statement in statements]
    assert sizes[0] <= HOT_READ_BYTES
    assert sum(sizes[1:-1]) <= 100 * FIXED_ROW_BYTES, "outlines hold no text"
    assert sizes[-1] <= MAX_PAGE_BYTES


async def test_next_large_context_begins_with_the_outlines(server: Server, chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(3):
        await chat.append(session_id, [new_message("x" * 200_000)])
    counts = []
    for _ in range(2):
        async with recording(server) as sent:
            reply = await chat.context(session_id)
        assert [message.seq for message in reply.messages] == [1, 2, 3]
        assert is_expensive(sent)
        counts.append(len(reads_of(sent, "chat_")))
    assert counts[1] == counts[0] - 1, "the hot read, whose rows were of no use, is left out"
    await chat.append(session_id, [new_message("short")])
    await chat.update_session(id=session_id, summary="xxx", summarized_through_seq=3)
    assert len((await chat.context(session_id)).messages) == 1
    async with recording(server) as sent:
        assert len((await chat.context(session_id)).messages) == 1
    assert len(reads_of(sent, "chat_")) == 1, "the prompt has become small"


async def test_large_page_needs_room_in_the_budget_and_a_small_one_does_not(
    server: Server, chat: Chat, other: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(4):
        await chat.append(session_id, [new_message("x" * 200_000)])
    small = await chat.start(new_messages(5))
    theirs = (await other.create_session()).id
    for _ in range(4):
        await other.append(theirs, [new_message("x" * 200_000)])
    while server.budget.held:  # Of the appends, until gRPC has sent the replies.
        await asyncio.sleep(0.01)
    # Beyond seven eighths, all calls of the user are rejected.
    monkeypatch.setattr(server.budget, "per_user", 4 * 1024 * 1024)
    held_bytes = server.budget.per_user * 7 // 8
    server.budget.add(chat.user_id, "", held_bytes)
    try:
        await assert_fails(chat.page(session_id), "OVERLOADED")
        await assert_fails(chat.context(session_id), "OVERLOADED")
        assert len((await chat.page(small)).messages) == 5
        assert len((await chat.context(small)).messages) == 5
        assert len((await other.page(theirs)).messages) == 4
    finally:
        server.budget.release(chat.user_id, "", held_bytes)
    assert len((await chat.page(session_id)).messages) == 4
    assert len((await chat.context(session_id)).messages) == 4


# --- Tombstones.

TOMBSTONES = 25_000


async def assert_scans_are_bounded(
    url: str, sent: Sequence[SentStatement], max_hot_rows: int
) -> None:
    """Check the rows that the statements read: the first is a hot one."""
    for number, statement in enumerate(reads_of(sent, "chat_messages")):
        for plan in await explain(url, [statement], "chat_messages"):
            max_rows = max_hot_rows if number == 0 else 2 * MAX_SCANNED + 10
            assert plan.rows_read("chat_messages") <= max_rows, f"{number}: {plan}"


@pytest.mark.parametrize("order", [ASC, DESC])
async def test_page_across_a_long_run_of_tombstones_is_full_and_its_scans_are_bounded(
    server: Server, chat: Chat, database_url: str, order: message_pb2.MessageOrder.ValueType
) -> None:
    session_id = await chat.start(new_messages(30))
    await insert_tombstones(database_url, chat, session_id, TOMBSTONES)
    await chat.append(session_id, new_messages(30))
    first, last = list(range(1, 31)), list(range(TOMBSTONES + 31, TOMBSTONES + 61))
    expected = first + last if order == ASC else (first + last)[::-1]
    await fetch(database_url, "ANALYZE chat_messages")
    async with recording(server) as sent:
        page = await chat.page(session_id, page_size=50, order=order)
    assert [message.seq for message in page.messages] == expected[:50]
    await assert_scans_are_bounded(database_url, sent, 110)
    rest = await chat.page(session_id, page_size=50, order=order, page_token=page.next_page_token)
    assert [message.seq for message in rest.messages] == expected[50:]
    assert rest.next_page_token == ""
    exact = await chat.page(session_id, page_size=30, order=order)
    assert [message.seq for message in exact.messages] == expected[:30]
    assert exact.next_page_token
    assert [message.seq for message in await chat.all(session_id, order=order)] == expected


async def test_list_of_tombstones_only_is_one_empty_page(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = (await chat.create_session()).id
    await insert_tombstones(database_url, chat, session_id, TOMBSTONES)
    for order in (ASC, DESC):
        page = await chat.page(session_id, order=order)
        assert page == message_pb2.ListMessagesResponse()
    assert (await chat.context(session_id)).messages == []


async def test_list_of_a_session_that_is_being_deleted_finds_what_is_left(
    chat: Chat, database_url: str
) -> None:
    session_id = (await chat.create_session()).id
    await insert_tombstones(database_url, chat, session_id, TOMBSTONES)
    await chat.append(session_id, new_messages(3))
    await fetch(
        database_url,
        "DELETE FROM chat_messages WHERE user_id = $1 AND session_id = $2 AND seq <= $3",
        chat.user_id,
        session_id,
        TOMBSTONES,
    )
    for order in (ASC, DESC):
        assert len(await chat.all(session_id, order=order)) == 3


async def test_context_behind_tombstones_costs_as_much_as_one_of_a_short_session(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = (await chat.create_session()).id
    await insert_tombstones(database_url, chat, session_id, 100_000)
    await chat.append(session_id, [new_message("be kind", SYSTEM), *new_messages(3)])
    await fetch(database_url, "ANALYZE chat_messages")
    async with recording(server) as sent:
        reply = await chat.context(session_id)
    assert [message.seq - 100_000 for message in reply.messages] == [1, 2, 3, 4]
    assert len(reads_of(sent, "chat_")) == 1, (
        "one hot statement suffices: it has read all messages that exist"
    )
    await assert_scans_are_bounded(database_url, sent, 500)
    # With more messages than the prompt holds, expensive work looks for the leading ones.
    await chat.append(session_id, new_messages(80))
    async with recording(server) as sent:
        reply = await chat.context(session_id, max_messages=20)
    seqs = [message.seq - 100_000 for message in reply.messages]
    assert seqs == [1, *range(66, 85)]
    assert is_expensive(sent)
    await assert_scans_are_bounded(database_url, sent, 500)


async def test_context_of_many_leading_system_messages_reads_a_bounded_number(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = (await chat.create_session()).id
    await insert_tombstones(database_url, chat, session_id, 50_000)
    await fetch(
        database_url,
        "UPDATE chat_messages SET deleted_at = NULL, role = 3, content = 'rule', size = 200"
        " WHERE user_id = $1 AND session_id = $2",
        chat.user_id,
        session_id,
    )
    await fetch(
        database_url,
        "UPDATE chat_sessions SET message_count = last_seq WHERE user_id = $1 AND id = $2",
        chat.user_id,
        session_id,
    )
    await chat.append(session_id, new_messages(2))
    await fetch(database_url, "ANALYZE chat_messages")
    async with recording(server) as sent:
        reply = await chat.context(session_id)
    assert [message.seq for message in reply.messages] == [*range(1, 1001), 50_002]
    await assert_scans_are_bounded(database_url, sent, 1000)


# --- Other lists.

NUMBERS = (
    "jsonb_build_object('n', (SELECT jsonb_agg(1e308::numeric) FROM generate_series(1, 1300)))"
)
"""Metadata of 16 KiB as a Struct, and 400 KB as text."""
COUNT = 120


async def sessions_of_large_metadata(chat: Chat, url: str) -> list[str]:
    await fetch(
        url,
        "INSERT INTO chat_sessions (user_id, id, metadata, fingerprint)"
        f" SELECT $1, gen_random_uuid(), {NUMBERS}, '' FROM generate_series(1, {COUNT})",
        chat.user_id,
    )
    return [session.id async for page in chat.session_pages(page_size=1000) for session in page]


async def users_of_large_metadata(chat: Chat, url: str) -> list[str]:
    await fetch(
        url,
        "INSERT INTO users (id, metadata, fingerprint)"
        f" SELECT gen_random_uuid(), {NUMBERS}, '' FROM generate_series(1, {COUNT - 1})",
    )
    ids: list[str] = []
    token = ""
    while True:
        reply = await chat.stub.ListUsers(
            user_pb2.ListUsersRequest(page_size=1000, page_token=token)
        )
        ids += [user.id for user in reply.users]
        if not (token := reply.next_page_token):
            return ids


async def documents_of_large_metadata(chat: Chat, url: str) -> list[str]:
    await fetch(
        url,
        "INSERT INTO documents (user_id, id, metadata, fingerprint)"
        f" SELECT $1, gen_random_uuid(), {NUMBERS}, '' FROM generate_series(1, {COUNT})",
        chat.user_id,
    )
    ids: list[str] = []
    token = ""
    while True:
        reply = await chat.stub.ListDocuments(
            document_pb2.ListDocumentsRequest(
                user_id=chat.user_id, page_size=1000, page_token=token
            )
        )
        ids += [document.id for document in reply.documents]
        if not (token := reply.next_page_token):
            return ids


LISTS: dict[str, Callable[[Chat, str], Awaitable[list[str]]]] = {
    "chat_sessions": sessions_of_large_metadata,
    "users": users_of_large_metadata,
    "documents": documents_of_large_metadata,
}


@pytest.mark.parametrize("table", LISTS)
async def test_list_reads_rows_within_a_bound_of_bytes(
    server: Server, chat: Chat, database_url: str, table: str
) -> None:
    async with recording(server) as sent:
        ids = await LISTS[table](chat, database_url)
    assert len(ids) == len(set(ids)) == COUNT
    statements = reads_of(sent, f"FROM {SCHEMA}.{table}")
    assert len(statements) > COUNT * 400_000 // MAX_PAGE_BYTES
    for statement in statements:
        assert await fetched_bytes(database_url, statement) <= MAX_PAGE_BYTES


async def test_small_list_is_one_ordinary_read(server: Server, chat: Chat) -> None:
    for _ in range(5):
        await chat.create_session(title="a title")
    await chat.list_sessions()  # The first list reads the key of page tokens.
    async with recording(server) as sent:
        page = await chat.list_sessions(page_size=1000)
    assert len(page.sessions) == 5
    assert len(sent) == 1
    assert not is_expensive(sent)


async def test_next_large_list_is_read_by_expensive_work_from_the_start(
    server: Server, chat: Chat
) -> None:
    for _ in range(12):
        await chat.create_session(metadata={"n": [1e308] * 1_000})
    async with recording(server) as sent:
        first = await chat.list_sessions()
    assert is_expensive(sent)
    async with recording(server) as sent:
        second = await chat.list_sessions()
    assert second == first
    reads = reads_of(sent, "chat_sessions")
    assert is_expensive(sent)
    assert reads[0] is not sent[0], "the limits of expensive work are set first"
    assert FIRST_LARGE_STEP in reads[0].args, "few sizes are computed"
    rest = await chat.list_sessions(page_token=first.next_page_token)
    ids = {session.id for page in (first, rest) for session in page.sessions}
    assert len(ids) == 12 > len(first.sessions)
    for session in (*first.sessions, *rest.sessions):
        await chat.update_session(("metadata",), id=session.id)
    assert len((await chat.list_sessions()).sessions) == 12
    async with recording(server) as sent:
        assert len((await chat.list_sessions()).sessions) == 12
    assert len(sent) == 1


async def test_rows_beyond_the_first_read_are_read_by_expensive_work(
    server: Server, chat: Chat, database_url: str
) -> None:
    await fetch(
        database_url,
        "INSERT INTO chat_sessions (user_id, id, fingerprint)"
        " SELECT $1, gen_random_uuid(), '' FROM generate_series(1, $2::int)",
        chat.user_id,
        3 * FIRST_READ_ROWS,
    )
    async with recording(server) as sent:
        page = await chat.list_sessions(page_size=2 * FIRST_READ_ROWS)
    assert len({session.id for session in page.sessions}) == 2 * FIRST_READ_ROWS
    assert len(reads_of(sent, "chat_sessions")) == 2
    assert is_expensive(sent)
    rest = await chat.list_sessions(page_size=1000, page_token=page.next_page_token)
    assert len(rest.sessions) == FIRST_READ_ROWS
    assert not {session.id for session in page.sessions} & {s.id for s in rest.sessions}


# --- Numbers that the database writes out: 1e308 has 309 digits.


def numbers(count: int) -> message_pb2.Message:
    half = count // 2
    return new_message("x", parts=[{"data": {"n": [1e308] * half + [1e-300] * (count - half)}}])


async def test_size_of_a_message_counts_the_digits_of_its_numbers(
    server: Server, chat: Chat, database_url: str
) -> None:
    session_id = await chat.start([numbers(300), new_message("x")])
    page = await chat.page(session_id)
    updated = page.messages[1]
    updated.parts.extend(numbers(300).parts)
    updated.metadata.update({"n": [1e308] * 100})
    changed = {"parts": updated.parts, "metadata": updated.metadata}
    await chat.update(session_id, updated.id, tuple(changed), **changed)
    await chat.update(session_id, updated.id, ("content",), content="another")
    rows = await fetch(
        database_url,
        "SELECT size, octet_length(parts::text) + coalesce(octet_length(metadata::text), 0) AS n"
        " FROM chat_messages WHERE user_id = $1",
        chat.user_id,
    )
    assert len(rows) == 2
    for row in rows:
        assert 90_000 < row["n"] <= row["size"]
    for _ in range(10):
        await chat.append(session_id, [numbers(600)])
    async with recording(server) as sent:
        page = await chat.page(session_id)
    assert len(page.messages) == 12
    first, *_ = reads_of(sent, "chat_messages")
    assert await fetched_bytes(database_url, first) <= HOT_READ_BYTES


async def test_message_with_too_many_long_numbers_is_rejected(chat: Chat) -> None:
    session_id = await chat.start()
    await assert_field_violations(
        chat.append(session_id, [numbers(4_000)]), "messages[0].parts[0].data"
    )
    text = new_message("1e308 " * 10_000, parts=[{"text": "1e308 " * 10_000}])
    await chat.append(session_id, [text])


@pytest.mark.parametrize("deleted", [1, 40, 74, 75, 76, 77, 96, 150])
async def test_list_and_watch_of_a_session_whose_deletion_was_cut_off(
    server: Server, chat: Chat, database_url: str, deleted: int
) -> None:
    """A deletion in slices begins with the oldest messages, and its deadline may end it."""
    count = 300
    session_id = await chat.start(new_messages(100))
    for _ in range(2):
        await chat.append(session_id, new_messages(100))
    await fetch(
        database_url,
        "DELETE FROM chat_messages WHERE user_id = $1 AND session_id = $2 AND seq <= $3",
        chat.user_id,
        session_id,
        deleted,
    )
    expected = list(range(deleted + 1, count + 1))
    for order, seqs in ((ASC, expected), (DESC, expected[::-1])):
        listed = await chat.all(session_id, order=order, page_size=50)
        assert [message.seq for message in listed] == seqs
    async with asyncio.timeout(20):
        watch = chat.watch(session_id)
        assert [(await watch.read()).message.seq for _ in expected] == expected
        watch.cancel()
