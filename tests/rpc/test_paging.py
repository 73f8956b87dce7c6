"""Lists: entries once and in order during writes, bounded pages, tokens bound to a request."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2

from tests.support.chat import Chat, new_id, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations

ASC, DESC = message_pb2.MESSAGE_ORDER_ASC, message_pb2.MESSAGE_ORDER_DESC
MIB = 1024 * 1024


async def fill(chat: Chat, session_id: str, count: int) -> None:
    """Append `count` messages, a hundred in each request."""
    for start in range(0, count, 100):
        await chat.append(session_id, new_messages(min(100, count - start)))


async def seqs(chat: Chat, session_id: str, **fields: Any) -> list[int]:
    return [message.seq for message in await chat.all(session_id, **fields)]


# --- Order and completeness.


@pytest.mark.parametrize("page_size", [1, 2, 3, 12, 13, 14, 100])
async def test_pages_have_no_gap_or_overlap(chat: Chat, page_size: int) -> None:
    session_id = await chat.start(new_messages(13))
    for order, expected in ((ASC, list(range(1, 14))), (DESC, list(range(13, 0, -1)))):
        pages = [
            [message.seq for message in page]
            async for page in chat.pages(session_id, page_size=page_size, order=order)
        ]
        assert [seq for page in pages for seq in page] == expected
        assert all(len(page) == page_size for page in pages[:-1])
        assert pages[-1]


async def test_messages_are_listed_in_ascending_seq_by_default(chat: Chat) -> None:
    session_id = await chat.start(new_messages(3))
    assert await seqs(chat, session_id) == [1, 2, 3]
    assert await seqs(chat, session_id, order=ASC) == [1, 2, 3]
    assert await seqs(chat, session_id, order=DESC) == [3, 2, 1]


async def test_pages_skip_deleted_messages_and_are_full(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(12))
    for erased in (0, 3, 4, 5, 11):
        await chat.delete(session_id, sent[erased].id)
    left = [2, 3, 7, 8, 9, 10, 11]
    for order, expected in ((ASC, left), (DESC, left[::-1])):
        pages = [
            [message.seq for message in page]
            async for page in chat.pages(session_id, page_size=3, order=order)
        ]
        assert pages == [expected[0:3], expected[3:6], expected[6:]]


async def test_page_token_survives_deletion_of_its_message(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(6))
    first = await chat.page(session_id, page_size=2)
    await chat.delete(session_id, sent[1].id)
    await chat.delete(session_id, sent[2].id)
    second = await chat.page(session_id, page_size=2, page_token=first.next_page_token)
    assert [message.seq for message in second.messages] == [4, 5]


async def test_empty_session_has_one_empty_page(chat: Chat) -> None:
    session = await chat.create_session()
    for order in (ASC, DESC):
        assert await chat.page(session.id, order=order) == message_pb2.ListMessagesResponse()
    await assert_fails(chat.page(new_id()), "SESSION_NOT_FOUND")


@pytest.mark.timeout(240)
async def test_ten_thousand_messages_are_listed_once_during_appends(chat: Chat) -> None:
    session_id = await chat.start(new_messages(1))
    await fill(chat, session_id, 9_999)
    done = asyncio.Event()

    async def talk() -> None:
        while not done.is_set():
            await chat.append(session_id, new_messages(2))

    talkers = [asyncio.create_task(talk()) for _ in range(3)]
    for page_size in (1000, 333):
        up = await seqs(chat, session_id, page_size=page_size, order=ASC)
        down = await seqs(chat, session_id, page_size=page_size, order=DESC)
        assert up == list(range(1, len(up) + 1))
        assert down == list(range(len(down), 0, -1))
        assert 10_000 <= len(up) <= len(down)
    done.set()
    await asyncio.gather(*talkers)


# --- Page sizes.


async def test_page_size_is_50_by_default_and_1000_at_most(chat: Chat) -> None:
    session_id = await chat.start(new_messages(1))
    await fill(chat, session_id, 1_009)
    for page_size, expected in (
        (0, 50),
        (1, 1),
        (999, 999),
        (1000, 1000),
        (1001, 1000),
        (2**31 - 1, 1000),
    ):
        for order in (ASC, DESC):
            page = await chat.page(session_id, page_size=page_size, order=order)
            assert len(page.messages) == expected
            assert page.next_page_token
    assert (await chat.page(session_id, page_size=5)).messages[0].content == "message 1"


async def test_page_sizes_apply_to_sessions_and_users(chat: Chat, database_url: str) -> None:
    insert = "INSERT INTO {} SELECT {} gen_random_uuid(), '' FROM generate_series(1, 1010)"
    await fetch(
        database_url,
        insert.format("chat_sessions (user_id, id, fingerprint)", f"'{chat.user_id}',"),
    )
    await fetch(database_url, insert.format("users (id, fingerprint)", ""))
    for page_size, expected in ((0, 50), (1, 1), (1000, 1000), (1001, 1000)):
        assert len((await chat.list_sessions(page_size=page_size)).sessions) == expected
        listed = await chat.stub.ListUsers(user_pb2.ListUsersRequest(page_size=page_size))
        assert len(listed.users) == expected


@pytest.mark.case(n=20)
@pytest.mark.parametrize("page_size", [-1, -(2**31)])
async def test_negative_page_size_is_rejected(chat: Chat, page_size: int) -> None:
    session_id = await chat.start()
    await assert_field_violations(chat.page(session_id, page_size=page_size), "page_size")
    await assert_field_violations(chat.list_sessions(page_size=page_size), "page_size")
    await assert_field_violations(
        chat.stub.ListUsers(user_pb2.ListUsersRequest(page_size=page_size)), "page_size"
    )


def heavy(size: int) -> message_pb2.Message:
    """Return a message of about `size` bytes serialized, half parts and half content."""
    quarter = "x" * (size // 4 - 100)
    return new_message(quarter, parts=[{"text": quarter} for _ in range(3)])


async def test_reply_ends_at_3_mib_and_the_next_page_continues(chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(7):
        await chat.append(session_id, [heavy(MIB - 1000), new_message("small")])
    for order in (ASC, DESC):
        pages = [page async for page in chat.pages(session_id, page_size=1000, order=order)]
        assert sorted(message.seq for page in pages for message in page) == list(range(1, 15))
        assert all(sum(message.ByteSize() for message in page) <= 3 * MIB for page in pages)
        assert 3 <= len(pages) <= 4


async def test_reply_size_counts_bytes_not_characters(chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    wide = "語" * (MIB // 3 // 4 - 100)
    for _ in range(6):
        await chat.append(
            session_id,
            [
                new_message(
                    wide, parts=[{"tool_result": {"tool_call_id": "c", "content": wide}}] * 3
                )
            ],
        )
    pages = [page async for page in chat.pages(session_id)]
    assert [message.seq for page in pages for message in page] == [1, 2, 3, 4, 5, 6]
    assert all(sum(message.ByteSize() for message in page) <= 3 * MIB for page in pages)


# Messages that are small in the database and large on the wire.
BULKY: dict[str, Callable[[], message_pb2.Message]] = {
    "numbers": lambda: new_message("x", parts=[{"data": {"n": [1] * 9_000}}]),
    "nulls": lambda: new_message("x", parts=[{"data": {"n": [None] * 9_000}}]),
    "keys": lambda: new_message("x", parts=[{"data": {str(n): n for n in range(9_000)}}]),
    "wide letters": lambda: new_message("x", parts=[{"text": "語" * 70_000}]),
    "metadata": lambda: new_message("x", metadata={"n": [1] * 1_400}),
    "comments": lambda: new_message("x", author="語" * 256, feedback={"comment": "語" * 4096}),
}


@pytest.mark.parametrize("kind", BULKY)
async def test_every_reply_is_below_the_clients_limit(chat: Chat, kind: str) -> None:
    message = BULKY[kind]()
    count = 5 * MIB // message.ByteSize() + 1
    session_id = (await chat.create_session()).id
    batch_size = min(count, 3 * MIB // message.ByteSize(), 5)  # At most 50,000 values.
    for start in range(0, count, batch_size):
        batch = [message_pb2.Message() for _ in range(min(batch_size, count - start))]
        for copy in batch:
            copy.CopyFrom(message)
            copy.id = new_id()
        await chat.append(session_id, batch)
    listed = await chat.page(session_id, page_size=1000)
    context = await chat.context(session_id, max_messages=1000)
    for reply in (listed, context):
        assert reply.ByteSize() < 3.5 * MIB
        assert reply.messages
    assert len(await chat.all(session_id, page_size=1000)) == count


async def test_list_of_large_sessions_ends_at_3_mib(chat: Chat) -> None:
    for _ in range(60):
        await chat.create_session(summary="x" * 65_000)
    pages = [page async for page in chat.session_pages(page_size=1000)]
    assert [len(page) > 0 for page in pages] == [True, True]
    assert len({session.id for page in pages for session in page}) == 60
    assert all(sum(session.ByteSize() for session in page) <= 3 * MIB for page in pages)


# --- Tokens.

Turn = Callable[[str], Awaitable[Any]]


async def lists(chat: Chat) -> list[tuple[str, Turn]]:
    """Return the token of each list's second page, and a function that reads a page by a token."""
    session_id = await chat.start(new_messages(5))
    for _ in range(3):
        await chat.create_session()
        await chat.stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User(name="x")))

    async def users(token: str) -> user_pb2.ListUsersResponse:
        return await chat.stub.ListUsers(user_pb2.ListUsersRequest(page_token=token, page_size=2))

    async def sessions(token: str) -> session_pb2.ListSessionsResponse:
        return await chat.list_sessions(page_token=token, page_size=2)

    async def messages(token: str) -> message_pb2.ListMessagesResponse:
        return await chat.page(session_id, page_token=token, page_size=2)

    turns: list[Turn] = [users, sessions, messages]
    return [((await turn("")).next_page_token, turn) for turn in turns]


def tampered(token: str) -> list[str]:
    """Return tokens that differ slightly from this one."""
    flipped = [
        token[:n] + ("B" if token[n] == "A" else "A") + token[n + 1 :] for n in range(len(token))
    ]
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    longer = base64.urlsafe_b64encode(raw + b"1").decode().rstrip("=")
    return [
        *flipped,
        token[:-1],
        token[1:],
        token + "A",
        token + "=",
        token + "==",
        " " + token,
        token + "\n",
        token * 2,
        longer,
        "A",
        "AAAA",
        "=",
        "!",
        "é",
        "'; DROP TABLE users; --",
        "0",
        "1",
        new_id(),
        "A" * 1024,
    ]


@pytest.mark.case(n=20)
async def test_tampered_page_token_is_rejected(chat: Chat) -> None:
    for token, turn in await lists(chat):
        assert token
        for bad in tampered(token):
            failure = await assert_fails(turn(bad), "BAD_PAGE_TOKEN")
            assert failure.fields == []
        await turn(token)


async def test_page_token_above_the_maximum_length_is_rejected(chat: Chat) -> None:
    for _, turn in await lists(chat):
        await assert_field_violations(turn("A" * 1025), "page_token")


async def test_page_token_of_another_list_is_rejected(chat: Chat) -> None:
    listed = await lists(chat)
    for token, turn in listed:
        for other_token, _ in listed:
            if other_token != token:
                await assert_fails(turn(other_token), "BAD_PAGE_TOKEN")


@pytest.mark.case(n=19)
async def test_page_token_of_another_request_is_rejected(chat: Chat, other: Chat) -> None:
    session_id = await chat.start(new_messages(5))
    another = await chat.start(new_messages(5))
    theirs = (await other.create_session(id=session_id)).id
    await other.append(theirs, new_messages(5))
    token = (await chat.page(session_id, page_size=2)).next_page_token
    for call in (
        chat.page(session_id, page_token=token, order=DESC),
        chat.page(another, page_token=token),
        other.page(theirs, page_token=token),
    ):
        await assert_fails(call, "BAD_PAGE_TOKEN")
    await other.create_session()
    token = (await chat.list_sessions(page_size=1)).next_page_token
    for call_ in (
        chat.list_sessions(page_token=token, state=session_pb2.SESSION_STATE_ACTIVE),
        other.list_sessions(page_token=token),
    ):
        await assert_fails(call_, "BAD_PAGE_TOKEN")


async def test_page_token_allows_another_page_size_and_case_of_ids(chat: Chat) -> None:
    session_id = await chat.start(new_messages(5))
    token = (await chat.page(session_id, page_size=2)).next_page_token
    shouting = Chat(chat.stub, chat.user_id.upper())
    page = await shouting.page(session_id.upper(), page_token=token, page_size=3, order=ASC)
    assert [message.seq for message in page.messages] == [3, 4, 5]
    assert page.next_page_token == ""


async def test_page_token_is_reusable_and_deterministic(chat: Chat) -> None:
    session_id = await chat.start(new_messages(5))
    tokens = {(await chat.page(session_id, page_size=2)).next_page_token for _ in range(2)}
    assert len(tokens) == 1
    token = tokens.pop()
    assert await chat.page(session_id, page_token=token) == await chat.page(
        session_id, page_token=token
    )


async def test_page_token_of_a_deleted_session_is_not_found(chat: Chat) -> None:
    session_id = await chat.start(new_messages(5))
    token = (await chat.page(session_id, page_size=2)).next_page_token
    await chat.delete_session(session_id)
    await assert_fails(chat.page(session_id, page_token=token), "SESSION_NOT_FOUND")


async def test_page_token_continues_after_deletions(chat: Chat) -> None:
    session_ids = [(await chat.create_session()).id for _ in range(5)]
    first = await chat.list_sessions(page_size=2)
    await chat.delete_session(first.sessions[1].id)
    await chat.delete_session(session_ids[2])
    second = await chat.list_sessions(page_size=2, page_token=first.next_page_token)
    assert [session.id for session in second.sessions] == session_ids[1::-1]
