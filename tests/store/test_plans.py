"""How the reads are run: by index, and on no more rows than they need, whatever else is in the tables."""

from __future__ import annotations

import asyncio

import pytest

from service.server import Server
from tests.support.chat import Chat, new_id
from tests.support.cluster import fetch
from tests.support.plans import Plan, explained, recorded

OTHERS = 100_000
OWN = 5_000


def assert_indexed(plan: Plan, table: str) -> None:
    scans = plan.scans(table)
    assert scans, plan
    for scan in scans:
        assert scan["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), plan
        conditions = [node.get("Index Cond", "") for node in plan.nodes(scan)]
        assert any("user_id = " in condition for condition in conditions), plan


async def fill_sessions(url: str, user_id: str) -> None:
    """Give a user 5,000 sessions, spread among 10^5 of 200 others."""
    await fetch(
        url,
        "INSERT INTO users (id, fingerprint) SELECT gen_random_uuid(), '' FROM generate_series(1, 200)",
    )
    await fetch(
        url,
        f"""
        INSERT INTO chat_sessions (user_id, id, title, metadata, created_at, updated_at, fingerprint)
        SELECT u.id, gen_random_uuid(), 'a title ' || n, '{{"k": "v"}}', at, at, ''
        FROM (
            SELECT n, n * 7919 % {OTHERS + OWN} AS place, '2026-01-01'::timestamptz + n * interval '1 s' AS at
            FROM generate_series(0, {OTHERS + OWN - 1}) AS n
        ) AS s
        JOIN (
            SELECT id, row_number() OVER (ORDER BY id) - 1 AS number FROM users WHERE id NOT IN ('{user_id}', '{new_id()}')
            AND id != '00000000-0000-0000-0000-000000000000'
            UNION ALL SELECT '{user_id}', -1
        ) AS u ON u.number = CASE WHEN s.place < {OWN} THEN -1 ELSE s.place % 200 END
        """,
    )
    await fetch(url, "ANALYZE chat_sessions")


@pytest.mark.timeout(300)
async def test_a_page_of_5000_sessions_among_100000_reads_the_users_own_rows_alone(
    server: Server, chat: Chat, database_url: str
) -> None:
    await fill_sessions(database_url, chat.user_id)
    (count,) = await fetch(
        database_url, "SELECT count(*) FROM chat_sessions WHERE user_id = $1", chat.user_id
    )
    assert count[0] == OWN
    async with recorded(server) as sent:
        first = await chat.list_sessions()
        second = await chat.list_sessions(page_token=first.next_page_token)
        await chat.list_sessions(page_size=1000, state="SESSION_STATE_ACTIVE")
    assert len(second.sessions) == 50
    plans = await explained(database_url, sent, "chat_sessions")
    assert len(plans) == 6
    for plan in plans:
        assert_indexed(plan, "chat_sessions")
        assert plan.rows_read("chat_sessions") <= OWN, plan
    print(
        "a page of",
        OWN,
        "sessions among",
        OTHERS,
        "takes",
        [f"{plan.milliseconds:.1f} ms" for plan in plans],
    )
    print(plans[0])


async def fill_messages(url: str, user_id: str, session_id: str, count: int) -> None:
    await fetch(
        url,
        """
        INSERT INTO chat_messages (user_id, session_id, seq, id, role, content, parts, token_estimate, size, fingerprint)
        SELECT $1, $2, n, gen_random_uuid(), CASE WHEN n <= 3 THEN 3 ELSE 1 + n % 2 END, 'message ' || n,
               CASE WHEN n % 100 = 1 AND n > 100 THEN '[{"tool_call": {"id": "x", "name": "f"}}]'::jsonb END, 3, 300, ''
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
async def test_a_prompt_and_a_page_are_read_by_index_whatever_the_sessions_length(
    server: Server, chat: Chat, other: Chat, database_url: str
) -> None:
    session_ids = [(await chat.create_session()).id for _ in range(3)]
    await other.create_session(id=session_ids[0])
    for who, session_id, count in (
        (chat, session_ids[0], 20_000),
        (other, session_ids[0], 20_000),
        (chat, session_ids[1], 20_000),
        (chat, session_ids[2], 200),
    ):
        await fill_messages(database_url, who.user_id, session_id, count)
    await fetch(database_url, "ANALYZE chat_messages")
    reads: dict[str, tuple[int, list[Plan]]] = {}
    for session_id in (session_ids[0], session_ids[2]):
        async with recorded(server) as sent:
            context = await chat.context(session_id)
        assert [each.seq for each in context.messages][:3] == [1, 2, 3]
        assert len(context.messages) == 50
        reads[f"context of {session_id}"] = (
            120,
            await explained(database_url, sent, "chat_messages"),
        )
    async with recorded(server) as sent:
        middle = await chat.page(session_ids[0], page_size=50)
        for _ in range(3):
            middle = await chat.page(
                session_ids[0], page_size=50, page_token=middle.next_page_token
            )
        await chat.page(session_ids[0], page_size=50, order="MESSAGE_ORDER_DESC")
        await chat.get(session_ids[0], middle.messages[0].id)
    reads["pages"] = 55, await explained(database_url, sent, "chat_messages")
    async with recorded(server) as sent:
        await asyncio.gather(
            *(chat.context(session_id, max_messages=20) for session_id in session_ids * 8)
        )
        await asyncio.gather(
            *(chat.page(session_id, page_size=20) for session_id in session_ids * 8)
        )
    # Many at once share a statement, each with its own rows.
    reads["at once"] = 16 * 60, await explained(database_url, sent, "chat_messages")
    for what, (rows, plans) in reads.items():
        assert plans, what
        for plan in plans:
            assert_indexed(plan, "chat_messages")
            assert plan.rows_read("chat_messages") <= rows, f"{what}: {plan}"
            if plan.scans("chat_sessions"):
                assert_indexed(plan, "chat_sessions")
        print(what, [f"{plan.milliseconds:.2f} ms" for plan in plans])


async def test_what_every_append_changes_is_not_indexed(database_url: str) -> None:
    """So the update stays on its page (HOT), and a long conversation leaves no trail in an index."""
    indexed = await fetch(
        database_url,
        """
        SELECT a.attname FROM pg_index AS i
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
        WHERE i.indrelid = 'chat_sessions'::regclass
        """,
    )
    assert {row["attname"] for row in indexed} == {"user_id", "id"}
