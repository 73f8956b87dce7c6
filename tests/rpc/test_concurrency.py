"""Concurrent writers through two servers: order, replays and conflicts are as if serial."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Iterable
from contextlib import AsyncExitStack
from typing import TypeVar

import pytest
from chathistory.v1 import message_pb2, session_pb2
from grpc import StatusCode, aio

from tests.support import failures
from tests.support.chat import Chat, new_id, new_message, new_messages
from tests.support.cluster import Cluster
from tests.support.history import History, StoredMessage, read_history, read_valid_history
from tests.support.servers import connected, serving

Reply = message_pb2.AppendMessagesResponse
T = TypeVar("T")


@pytest.fixture
async def chats(database_url: str) -> AsyncGenerator[tuple[Chat, Chat]]:
    """Yield one user's chat through each of two servers."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(serving(database_url)) for _ in range(2)]
        stubs = [await stack.enter_async_context(connected(server.address)) for server in servers]
        first = await Chat.of_new_user(stubs[0])
        yield first, Chat(stubs[1], first.user_id)


async def settle(calls: Iterable[Awaitable[T]]) -> tuple[list[T], list[failures.Failure]]:
    """Wait for calls; return the results of the successful ones and the failures of the others."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    good: list[T] = []
    bad: list[failures.Failure] = []
    for result in done:
        if isinstance(result, aio.AioRpcError):
            bad.append(failures.read_failure(result))
        elif isinstance(result, BaseException):
            raise result
        else:
            good.append(result)
    return good, bad


def seqs(reply: Reply) -> list[int]:
    return [entry.seq for entry in reply.messages]


def test_history_check_rejects_inconsistent_histories() -> None:
    """Most tests here rely on `History.check`: it must reject ties, gaps and decreasing times."""

    def stored(*rows: tuple[int, int]) -> History:
        messages = [StoredMessage(seq, new_id(), "", at, b"", False) for seq, at in rows]
        return History(1, rows[-1][0], len(rows), messages)

    stored((1, 5), (2, 5), (3, 6)).check()
    for wrong in (stored((1, 5), (1, 5)), stored((1, 5), (3, 5)), stored((1, 5), (2, 4))):
        with pytest.raises(AssertionError):
            wrong.check()


@pytest.mark.case(n=14)
async def test_hundred_concurrent_writers_of_one_session_leave_no_gap(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session = await chats[0].create_session()

    async def writer(number: int) -> list[Reply]:
        chat = chats[number % 2]
        return [
            await chat.append(session.id, new_messages(1 + (number + turn) % 3, f"{number}.{turn}"))
            for turn in range(3)
        ]

    async with asyncio.timeout(60):
        replies = list(
            itertools.chain.from_iterable(await asyncio.gather(*map(writer, range(100))))
        )
    history = await read_valid_history(database_url, chats[0].user_id, session.id)
    history.check_contains(replies)
    total = sum(len(reply.messages) for reply in replies)
    assert sorted(itertools.chain.from_iterable(map(seqs, replies))) == list(range(1, total + 1))
    for reply in replies:
        first = reply.messages[0].seq
        assert seqs(reply) == list(range(first, first + len(reply.messages))), (
            "the messages of a request have consecutive seqs"
        )
        assert not any(entry.replayed for entry in reply.messages)
    listed = await chats[1].all(session.id, page_size=100)
    assert [(m.id, m.seq, m.create_time.ToMicroseconds()) for m in listed] == [
        (m.id, m.seq, m.created_us) for m in history.messages
    ]


async def test_concurrent_writers_of_many_sessions_keep_them_apart(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session_ids = [(await chats[0].create_session()).id for _ in range(8)]
    calls = [
        (session_ids[n % 8], chats[n // 8 % 2].append(session_ids[n % 8], new_messages(2)))
        for n in range(160)
    ]
    replies = await asyncio.gather(*(call for _, call in calls))
    for session_id in session_ids:
        mine = [
            reply
            for (requested_id, _), reply in zip(calls, replies, strict=True)
            if requested_id == session_id
        ]
        assert all(reply.session_id == session_id for reply in mine)
        history = await read_valid_history(database_url, chats[0].user_id, session_id)
        history.check_contains(mine)
        assert history.last_seq == 40


@pytest.mark.case(n=9)
async def test_fifty_identical_appends_are_stored_once(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session = await chats[0].create_session()
    await chats[0].append(session.id, "before")
    message = new_message("once")
    replies = await asyncio.gather(*(chats[n % 2].append(session.id, [message]) for n in range(50)))
    answers = Counter(
        (
            r.session_id,
            r.messages[0].id,
            r.messages[0].seq,
            r.messages[0].create_time.ToMicroseconds(),
        )
        for r in replies
    )
    assert len(answers) == 1
    assert sum(not reply.messages[0].replayed for reply in replies) == 1
    history = await read_valid_history(database_url, chats[0].user_id, session.id)
    history.check_contains(replies)
    assert history.last_seq == 2


@pytest.mark.case(n=9)
async def test_fifty_identical_appends_create_one_session(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    messages = new_messages(3)
    replies = await asyncio.gather(*(chats[n % 2].append("", messages) for n in range(50)))
    assert {reply.session_id for reply in replies} == {
        str(uuid.uuid5(uuid.UUID(chats[0].user_id), messages[0].id))
    }
    assert sum(reply.session_created for reply in replies) == 1
    fresh = [reply for reply in replies if not any(entry.replayed for entry in reply.messages)]
    assert len(fresh) == 1
    assert fresh[0].session_created
    assert all(seqs(reply) == [1, 2, 3] for reply in replies)
    (
        await read_valid_history(database_url, chats[0].user_id, replies[0].session_id)
    ).check_contains(replies)


async def test_derived_session_id_ignores_the_case_of_the_message_id(
    chat: Chat,
) -> None:
    message = new_message("once")
    first = await chat.append("", [message])
    message.id = message.id.upper()
    again = await chat.append("", [message])
    assert again.session_id == first.session_id
    assert again.messages[0].replayed


@pytest.mark.case(n=8)
async def test_one_of_several_different_messages_with_one_id_is_stored(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session = await chats[0].create_session()
    message_id = new_id()
    calls = [
        chats[n % 2].append(session.id, [new_message(f"content {n % 5}", id=message_id)])
        for n in range(40)
    ]
    good, bad = await settle(calls)
    assert len(good) == 8, "the winner and its replays"
    assert sum(not reply.messages[0].replayed for reply in good) == 1
    assert {(failure.reason, failure.metadata["message_id"]) for failure in bad} == {
        ("MESSAGE_ID_REUSED", message_id)
    }
    assert (await read_valid_history(database_url, chats[0].user_id, session.id)).last_seq == 1


async def test_overlapping_appends_store_each_message_once(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    """Sliding windows over one list of messages: each mixes replays with new messages."""
    session = await chats[0].create_session()
    messages = new_messages(60)
    windows = [messages[start : start + 6] for start in range(0, 55, 2)] * 2
    replies = await asyncio.gather(
        *(chats[n % 2].append(session.id, window) for n, window in enumerate(windows))
    )
    history = await read_valid_history(database_url, chats[0].user_id, session.id)
    history.check_contains(replies)
    assert history.last_seq == len(messages)
    assert Counter(e.id for reply in replies for e in reply.messages if not e.replayed) == Counter(
        m.id for m in messages
    )
    for window, reply in zip(windows, replies, strict=True):
        assert [entry.id for entry in reply.messages] == [message.id for message in window]
        fresh = [entry.seq for entry in reply.messages if not entry.replayed]
        assert not fresh or fresh == list(range(fresh[0], fresh[0] + len(fresh))), (
            "new messages have consecutive seqs"
        )


async def test_one_of_several_appends_with_the_same_expected_seq_is_stored(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session = await chats[0].create_session()
    for last_seq in (0, 1):
        good, bad = await settle(
            chats[n % 2].append(session.id, f"{last_seq}.{n}", expected_last_seq=last_seq)
            for n in range(20)
        )
        assert [seqs(reply) for reply in good] == [[last_seq + 1]]
        assert {(failure.reason, failure.metadata["last_seq"]) for failure in bad} == {
            ("LAST_SEQ_MISMATCH", str(last_seq + 1))
        }
    (await read_valid_history(database_url, chats[0].user_id, session.id)).check()


async def test_expected_seq_zero_matches_a_session_to_create(chat: Chat, database_url: str) -> None:
    session_id = new_id()
    call = chat.append(session_id, "hello", create_if_missing=True, expected_last_seq=1)
    await failures.assert_fails(call, "LAST_SEQ_MISMATCH", session_id=session_id, last_seq=0)
    assert await read_history(database_url, chat.user_id, session_id) is None
    reply = await chat.append(session_id, "hello", create_if_missing=True, expected_last_seq=0)
    assert reply.session_created


async def test_concurrent_appends_with_create_if_missing_create_one_session(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session_id = new_id()
    calls = [
        chats[n % 2].append(
            session_id,
            f"{n}",
            create_if_missing=True,
            session=session_pb2.Session(title=f"title {n}"),
        )
        for n in range(40)
    ]
    replies = await asyncio.gather(*calls)
    makers = [reply for reply in replies if reply.session_created]
    assert len(makers) == 1
    assert seqs(makers[0]) == [1]
    title = (await chats[0].get_session(session_id)).title
    assert title == f"title {replies.index(makers[0])}"
    history = await read_valid_history(database_url, chats[0].user_id, session_id)
    history.check_contains(replies)
    assert history.last_seq == 40


async def test_concurrent_appends_leave_the_etag_valid(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    session = await chats[0].create_session(title="before")
    writing = [asyncio.create_task(chats[n % 2].append(session.id, f"{n}")) for n in range(60)]
    for number in range(5):
        session = await chats[number % 2].update_session(
            ["title"], id=session.id, title=f"title {number}", etag=session.etag
        )
    replies = await asyncio.gather(*writing)
    after = await chats[0].get_session(session.id)
    assert (after.title, after.last_seq, after.etag) == ("title 4", 60, session.etag)
    (await read_valid_history(database_url, chats[0].user_id, session.id)).check_contains(replies)


async def test_concurrent_appends_updates_and_deletions_keep_counts_right(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    """Concurrent operations on the same rows: no deadlock reaches a caller, counts are right."""
    session = await chats[0].create_session()
    first = await chats[0].append(session.id, new_messages(20))
    ids = [entry.id for entry in first.messages]
    work: list[Awaitable[object]] = [
        chats[n % 2].append(session.id, new_messages(2, f"{n}")) for n in range(40)
    ]
    work += [chats[n % 2].delete(session.id, ids[n]) for n in range(10)]
    work += [
        chats[n % 2].update(session.id, ids[10 + n], ["content"], content="edited")
        for n in range(10)
    ]
    work += [chats[n % 2].fork(session.id, 20) for n in range(6)]
    good, bad = await settle(work)
    assert not bad
    history = await read_valid_history(database_url, chats[0].user_id, session.id)
    assert (history.last_seq, history.message_count) == (100, 90)
    for fork in [reply for reply in good if isinstance(reply, session_pb2.Session)]:
        assert (await read_valid_history(database_url, chats[0].user_id, fork.id)).last_seq == 20


async def test_appends_during_deletion_of_their_session_are_stored_or_not_found(
    chats: tuple[Chat, Chat], database_url: str
) -> None:
    """Appends that may create the session race with its deletion; the history stays valid."""
    session_id = new_id()

    async def write(number: int) -> None:
        chat = chats[number % 2]
        if number % 5 == 0:
            await chat.delete_session(session_id, allow_missing=True)
        else:
            await chat.append(
                session_id, new_messages(2, f"{number}"), create_if_missing=number % 5 != 1
            )

    _, bad = await settle(write(number) for number in range(100))
    assert {failure.reason for failure in bad} <= {"SESSION_NOT_FOUND"}
    history = await read_history(database_url, chats[0].user_id, session_id)
    if history is not None:
        history.check()


@pytest.mark.parametrize("before", [0.0, 0.5], ids=["with the others", "by themselves before"])
async def test_locked_session_does_not_delay_other_sessions(
    chat: Chat, cluster: Cluster, database_url: str, before: float
) -> None:
    """Other sessions are served while the lock is held, and this one afterwards."""
    locked, *others = [await chat.create_session() for _ in range(9)]
    holder = await cluster.connect(database_url.partition("?")[0].rpartition("/")[2])
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", locked.id)
            waiting = [asyncio.create_task(chat.append(locked.id, f"{n}")) for n in range(4)]
            await asyncio.sleep(before)
            for _ in range(3):
                await asyncio.gather(*(chat.append(session.id, "meanwhile") for session in others))
            assert not any(task.done() for task in waiting)
        replies = await asyncio.gather(*waiting)
    finally:
        await holder.close()
    (await read_valid_history(database_url, chat.user_id, locked.id)).check_contains(replies)


async def test_append_to_a_locked_session_fails_at_its_deadline(
    chat: Chat, cluster: Cluster, database_url: str
) -> None:
    session = await chat.create_session()
    holder = await cluster.connect(database_url.partition("?")[0].rpartition("/")[2])
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session.id)
            request = message_pb2.AppendMessagesRequest(
                user_id=chat.user_id, session_id=session.id, messages=[new_message("never")]
            )
            with pytest.raises(aio.AioRpcError) as caught:
                await chat.stub.AppendMessages(request, timeout=1.0)
            assert caught.value.code() in (StatusCode.ABORTED, StatusCode.DEADLINE_EXCEEDED)
    finally:
        await holder.close()
    assert seqs(await chat.append(session.id, "afterwards")) == [1]


async def test_batched_reads_return_each_reader_its_own_rows(chat: Chat, other: Chat) -> None:
    """Concurrent pages and contexts of two users' sessions: each reader gets its own rows."""
    owned = [
        (owner, await owner.start(new_messages(3 + 7 * n, f"{n}")))
        for n in range(6)
        for owner in (chat, other)
    ]
    descending = message_pb2.MESSAGE_ORDER_DESC

    def reads() -> list[
        Awaitable[message_pb2.ListMessagesResponse | message_pb2.GetContextResponse]
    ]:
        return [
            call
            for owner, session_id in owned
            for call in (
                owner.page(session_id),
                owner.page(session_id, page_size=2),
                owner.page(session_id, page_size=5, order=descending),
                owner.context(session_id, max_messages=4),
            )
        ]

    alone = [(await call).SerializeToString() for call in reads()]
    for _ in range(3):
        together = await asyncio.gather(*reads())
        assert [reply.SerializeToString() for reply in together] == alone
    # Another user's session is not found, even in one batch with reads by its owner.
    wrong = [other.page(owned[0][1]), other.context(owned[0][1])]
    _, refused = await settle([*reads(), *wrong, *reads()])
    assert [failure.reason for failure in refused] == ["SESSION_NOT_FOUND", "SESSION_NOT_FOUND"]


async def test_read_sees_every_append_acknowledged_before_it(chats: tuple[Chat, Chat]) -> None:
    """Whichever server took the append, and however many reads are in flight."""
    session = await chats[0].create_session()

    async def write_and_read(number: int) -> None:
        for turn in range(4):
            reply = await chats[number % 2].append(session.id, f"{number}.{turn}")
            seq = reply.messages[0].seq
            page = await chats[turn % 2].page(
                session.id, page_size=1, order=message_pb2.MESSAGE_ORDER_DESC
            )
            assert page.messages[0].seq >= seq
            context = await chats[(turn + 1) % 2].context(session.id, max_messages=1)
            assert context.messages[-1].seq >= seq
            assert (await chats[turn % 2].get_session(session.id)).last_seq >= seq

    await asyncio.gather(*map(write_and_read, range(24)))
