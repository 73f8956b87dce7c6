"""Reads use an index and read no more rows than they need, whatever else the tables hold."""

from __future__ import annotations

import asyncio

import pytest

from service.ids import SYSTEM_USER_ID
from service.server import Server
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.plans import Plan, explain, recording

OTHER_SESSIONS = 100_000
OWN_SESSIONS = 5_000


def assert_indexed(plan: Plan, table: str) -> None:
    scans = plan.scans(table)
    assert scans, plan
    for scan in scans:
        assert scan["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), plan
        conditions = [node.get("Index Cond", "") for node in plan.nodes(scan)]
        assert any("user_id = " in condition for condition in conditions), plan


async def insert_sessions(url: str, user_id: str) -> None:
    """Insert 5,000 sessions of a user, mixed with 100,000 sessions of 200 other users."""
    await fetch(
        url,
        "INSERT INTO users (id, fingerprint)"
        " SELECT gen_random_uuid(), '' FROM generate_series(1, 200)",
    )
    total = OTHER_SESSIONS + OWN_SESSIONS
    await fetch(
        url,
        f"""
        INSERT INTO chat_sessions
            (user_id, id, title, metadata, created_at, updated_at, fingerprint)
        SELECT u.id, gen_random_uuid(), 'a title ' || n, '{{"k": "v"}}', at, at, ''
        FROM (
            SELECT n, n * 7919 % {total} AS shuffled,
                   '2026-01-01'::timestamptz + n * interval '1 s' AS at
            FROM generate_series(0, {total - 1}) AS n
        ) AS s
        JOIN (
            SELECT id, row_number() OVER (ORDER BY id) - 1 AS number FROM users
            WHERE id NOT IN ('{user_id}', '{SYSTEM_USER_ID}')
            UNION ALL SELECT '{user_id}', -1
        ) AS u
          ON u.number = CASE WHEN s.shuffled < {OWN_SESSIONS} THEN -1 ELSE s.shuffled % 200 END
        """,
    )
    await fetch(url, "ANALYZE chat_sessions")


@pytest.mark.timeout(300)
async def test_a_page_of_sessions_reads_rows_of_its_user_only(
    server: Server, chat: Chat, database_url: str
) -> None:
    await insert_sessions(database_url, chat.user_id)
    (count,) = await fetch(
        database_url, "SELECT count(*) FROM chat_sessions WHERE user_id = $1", chat.user_id
    )
    assert count[0] == OWN_SESSIONS
    async with recording(server) as sent:
        first = await chat.list_sessions()
        second = await chat.list_sessions(page_token=first.next_page_token)
        await chat.list_sessions(page_size=1000, state="SESSION_STATE_ACTIVE")
    assert len(second.sessions) == 50
    plans = await explain(database_url, sent, "chat_sessions")
    assert len(plans) == 8, "a page of 1,000 is read by two statements"
    for plan in plans:
        assert_indexed(plan, "chat_sessions")
        assert plan.rows_read("chat_sessions") <= OWN_SESSIONS, plan
    print(
        "a page of",
        OWN_SESSIONS,
        "sessions among",
        OTHER_SESSIONS,
        "takes",
        [f"{plan.milliseconds:.1f} ms" for plan in plans],
    )
    print(plans[0])


async def insert_messages(url: str, user_id: str, session_id: str, count: int) -> None:
    await fetch(
        url,
        """
        INSERT INTO chat_messages
            (user_id, session_id, seq, id, role, content, parts, token_estimate, size, fingerprint)
        SELECT $1, $2, n, gen_random_uuid(), CASE WHEN n <= 3 THEN 3 ELSE 1 + n % 2 END,
               'message ' || n,
               CASE WHEN n % 100 = 1 AND n > 100
                    THEN '[{"tool_call": {"id": "x", "name": "f"}}]'::jsonb END,
               3, 300, ''
        FROM generate_series(1, $3::int) AS n
        """,
        user_id,
        session_id,
        count,
    )
    await fetch(
        url,
        "UPDATE chat_sessions SET last_seq = $3, message_count = $3 WHERE user_id = $1 AND id = $2",
        user_id,
        session_id,
        count,
    )


@pytest.mark.timeout(300)
async def test_a_context_and_a_page_of_a_long_session_are_read_by_index(
    server: Server, chat: Chat, other: Chat, database_url: str
) -> None:
    session_ids = [(await chat.create_session()).id for _ in range(3)]
    await other.create_session(id=session_ids[0])
    for user, session_id, count in (
        (chat, session_ids[0], 20_000),
        (other, session_ids[0], 20_000),
        (chat, session_ids[1], 20_000),
        (chat, session_ids[2], 200),
    ):
        await insert_messages(database_url, user.user_id, session_id, count)
    await fetch(database_url, "ANALYZE chat_messages")
    reads: dict[str, tuple[int, list[Plan]]] = {}
    for session_id in (session_ids[0], session_ids[2]):
        async with recording(server) as sent:
            context = await chat.context(session_id)
        assert [message.seq for message in context.messages][:3] == [1, 2, 3]
        assert len(context.messages) == 50
        reads[f"context of {session_id}"] = (
            120,
            await explain(database_url, sent, "chat_messages"),
        )
    async with recording(server) as sent:
        middle = await chat.page(session_ids[0], page_size=50)
        for _ in range(3):
            middle = await chat.page(
                session_ids[0], page_size=50, page_token=middle.next_page_token
            )
        await chat.page(session_ids[0], page_size=50, order="MESSAGE_ORDER_DESC")
        await chat.get(session_ids[0], middle.messages[0].id)
    reads["pages"] = 55, await explain(database_url, sent, "chat_messages")
    async with recording(server) as sent:
        await asyncio.gather(
            *(chat.context(session_id, max_messages=20) for session_id in session_ids * 8)
        )
        await asyncio.gather(
            *(chat.page(session_id, page_size=20) for session_id in session_ids * 8)
        )
    # Concurrent reads share a statement.
    reads["concurrent reads"] = 16 * 60, await explain(database_url, sent, "chat_messages")
    for name, (max_rows, plans) in reads.items():
        assert plans, name
        for plan in plans:
            assert_indexed(plan, "chat_messages")
            assert plan.rows_read("chat_messages") <= max_rows, f"{name}: {plan}"
            if plan.scans("chat_sessions"):
                assert_indexed(plan, "chat_sessions")
        print(name, [f"{plan.milliseconds:.2f} ms" for plan in plans])


async def test_columns_that_an_append_changes_are_not_indexed(database_url: str) -> None:
    """The update then stays on its page (HOT), and a long conversation adds no index entries."""
    rows = await fetch(
        database_url,
        """
        SELECT a.attname FROM pg_index AS i
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
        WHERE i.indrelid = 'chat_sessions'::regclass
        """,
    )
    assert {row["attname"] for row in rows} == {"user_id", "id"}
