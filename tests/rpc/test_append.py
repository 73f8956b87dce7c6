"""AppendMessages: gapless seqs, atomic, idempotent, with errors in the contract's order."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2

from service.ids import SYSTEM_USER_ID
from tests.support.chat import ASSISTANT, Chat, new_id, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations

ACTIVE, ARCHIVED = session_pb2.SESSION_STATE_ACTIVE, session_pb2.SESSION_STATE_ARCHIVED


def seqs_and_replays(reply: message_pb2.AppendMessagesResponse) -> list[tuple[int, bool]]:
    """Return the seq of each message, and whether it is a replay."""
    return [(entry.seq, entry.replayed) for entry in reply.messages]


async def stored(chat: Chat, session_id: str) -> list[str]:
    return [message.content for message in await chat.all(session_id)]


# --- Order.


async def test_seq_counts_from_1_without_gaps_over_appends_of_any_size(
    chat: Chat, session: session_pb2.Session
) -> None:
    sizes = [1, 3, 100, 1, 2]
    seen: list[int] = []
    for size in sizes:
        reply = await chat.append(session.id, new_messages(size))
        assert len({entry.create_time.ToMicroseconds() for entry in reply.messages}) == 1
        assert not reply.session_created
        seen += [entry.seq for entry in reply.messages]
    assert seen == list(range(1, sum(sizes) + 1))
    after = await chat.get_session(session.id)
    assert after.last_seq == after.message_count == sum(sizes)


async def test_messages_of_a_request_get_seqs_in_its_order(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = new_messages(50)
    reply = await chat.append(session.id, sent)
    assert [entry.id for entry in reply.messages] == [message.id for message in sent]
    assert [entry.seq for entry in reply.messages] == list(range(1, 51))
    assert await stored(chat, session.id) == [message.content for message in sent]


async def test_concurrent_appends_leave_no_gap_and_keep_requests_together(chat: Chat) -> None:
    session_id = await chat.start()
    replies = await asyncio.gather(*(chat.append(session_id, new_messages(3)) for _ in range(30)))
    blocks = sorted([entry.seq for entry in reply.messages] for reply in replies)
    assert [seq for block in blocks for seq in block] == list(range(2, 92))
    assert [message.seq for message in await chat.all(session_id)] == list(range(1, 92))


async def test_each_session_has_its_own_seqs(chat: Chat, other: Chat) -> None:
    session_id = new_id()
    mine, theirs, second = [
        (await user.create_session(id=id_)).id
        for user, id_ in ((chat, session_id), (other, session_id), (chat, ""))
    ]
    replies = await asyncio.gather(
        *(
            user.append(id_, new_messages(2))
            for _ in range(5)
            for user, id_ in ((chat, mine), (other, theirs), (chat, second))
        )
    )
    assert sorted(entry.seq for reply in replies for entry in reply.messages) == sorted(
        [*range(1, 11)] * 3
    )


async def test_rejected_append_uses_no_seq(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(2))
    await assert_fails(
        chat.append(session_id, [new_message("new"), new_message("other", id=sent[0].id)]),
        "MESSAGE_ID_REUSED",
    )
    await assert_fails(chat.append(session_id, "new", expected_last_seq=1), "LAST_SEQ_MISMATCH")
    await assert_field_violations(
        chat.append(session_id, [new_message("a\0")]), "messages[0].content"
    )
    assert seqs_and_replays(await chat.append(session_id, "next")) == [(3, False)]


# --- Retries.


async def test_retry_gets_the_same_reply_and_stores_nothing(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = [
        new_message("one", metadata={"b": 1, "a": {"y": 1, "x": 2}}),
        new_message("two", parts=[{"data": {"k": [1]}}]),
    ]
    first = await chat.append(session.id, sent)
    await chat.append(session.id, "between")
    again = await chat.append(session.id, sent)
    assert seqs_and_replays(first) == [(1, False), (2, False)]
    assert seqs_and_replays(again) == [(1, True), (2, True)]
    assert [entry.create_time for entry in again.messages] == [
        entry.create_time for entry in first.messages
    ]
    assert len(await chat.all(session.id)) == 3


@pytest.mark.case(n=9)
async def test_fifty_equal_concurrent_appends_store_one(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = new_messages(2)
    replies = await asyncio.gather(*(chat.append(session.id, sent) for _ in range(50)))
    assert {tuple(entry.seq for entry in reply.messages) for reply in replies} == {(1, 2)}
    assert (
        len({entry.create_time.ToMicroseconds() for reply in replies for entry in reply.messages})
        == 1
    )
    assert sorted(reply.messages[0].replayed for reply in replies) == [False] + [True] * 49
    assert await stored(chat, session.id) == ["message 1", "message 2"]


async def test_spelling_of_id_and_metadata_makes_no_different_message(chat: Chat) -> None:
    sent = new_message("one", metadata={"a": 1, "b": 2})
    session_id = await chat.start([sent])
    respelled = new_message(
        "one", id=sent.id.upper(), metadata={"b": 2, "a": 1}, session_id=session_id
    )
    respelled.seq, respelled.etag = 7, "anything"
    respelled.create_time.seconds = 1
    assert seqs_and_replays(await chat.append(session_id.upper(), [respelled])) == [(1, True)]


async def test_message_that_was_read_can_be_appended_again_unchanged(chat: Chat) -> None:
    session_id = await chat.start(
        [
            new_message(
                "one", ASSISTANT, metadata={"k": [None]}, parts=[{"text": "p"}], token_count=0
            )
        ]
    )
    read = await chat.all(session_id)
    assert seqs_and_replays(await chat.append(session_id, read)) == [(1, True)]


OTHERS: list[dict[str, Any]] = [
    {"content": "changed"},
    {"role": ASSISTANT},
    {"author": "Bob"},
    {"metadata": {"k": 2}},
    {"token_count": 0},
    {"feedback": {"score": 0}},
    {"parts": [{"text": "p"}, {"text": "p"}]},
]


@pytest.mark.case(n=8)
@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
async def test_reused_id_with_different_content_is_rejected(
    chat: Chat, change: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        "id": new_id(),
        "content": "one",
        "metadata": {"k": 1},
        "parts": [{"text": "p"}],
    }
    session_id = await chat.start([new_message(**fields)])
    await assert_fails(
        chat.append(session_id, [new_message(**fields | change)]),
        "MESSAGE_ID_REUSED",
        session_id=session_id,
        message_id=fields["id"],
    )
    assert await stored(chat, session_id) == ["one"]


async def test_same_id_in_another_session_is_another_message(chat: Chat, other: Chat) -> None:
    sent = new_message("one")
    first = await chat.start([sent])
    second = (await chat.create_session()).id
    theirs = (await other.create_session(id=first)).id
    assert seqs_and_replays(await chat.append(second, [new_message("two", id=sent.id)])) == [
        (1, False)
    ]
    assert seqs_and_replays(await other.append(theirs, [new_message("three", id=sent.id)])) == [
        (1, False)
    ]
    assert (await stored(chat, first), await stored(chat, second), await stored(other, theirs)) == (
        ["one"],
        ["two"],
        ["three"],
    )


async def test_append_without_ids_gets_new_ids_on_each_retry(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = [new_message("one", id=""), new_message("one", id="")]
    replies = [await chat.append(session.id, sent) for _ in range(2)]
    assert [seq for reply in replies for seq, _ in seqs_and_replays(reply)] == [1, 2, 3, 4]
    ids = [entry.id for reply in replies for entry in reply.messages]
    assert len(set(ids)) == 4
    assert all(uuid.UUID(id_).version == 7 for id_ in ids)
    assert [message.id for message in await chat.all(session.id)] == ids


async def test_duplicate_id_in_one_request_is_rejected(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = new_message("one")
    await assert_field_violations(
        chat.append(session.id, [sent, new_message("two"), sent]), "messages[2].id"
    )
    await assert_field_violations(
        chat.append(session.id, [sent, new_message("one", id=sent.id.upper())]), "messages[1].id"
    )
    assert await stored(chat, session.id) == []


# --- Replays mixed with new messages.


async def test_mixed_append_keeps_replayed_seqs_and_adds_new_ones_together(
    chat: Chat, session: session_pb2.Session
) -> None:
    old, new = new_messages(4, "old"), new_messages(3, "new")
    await chat.append(session.id, old)
    reply = await chat.append(session.id, [new[0], old[2], new[1], old[0], new[2]])
    assert seqs_and_replays(reply) == [(5, False), (3, True), (6, False), (1, True), (7, False)]
    assert [entry.id for entry in reply.messages] == [
        new[0].id,
        old[2].id,
        new[1].id,
        old[0].id,
        new[2].id,
    ]
    assert [message.seq for message in await chat.all(session.id)] == [1, 2, 3, 4, 5, 6, 7]


async def test_mixed_append_is_atomic(chat: Chat, session: session_pb2.Session) -> None:
    old = new_messages(2, "old")
    await chat.append(session.id, old)
    wrong = new_message("other", id=old[1].id)
    for request in (
        [new_message("new"), wrong],
        [wrong, new_message("new")],
        [old[0], new_message("new"), wrong],
    ):
        await assert_fails(
            chat.append(session.id, request), "MESSAGE_ID_REUSED", message_id=wrong.id
        )
    assert await stored(chat, session.id) == ["old 1", "old 2"]
    after = await chat.get_session(session.id)
    assert (after.last_seq, after.message_count) == (2, 2)


async def test_overlapping_concurrent_requests_store_each_message_once(
    chat: Chat, session: session_pb2.Session
) -> None:
    sent = new_messages(12)
    requests = [sent[start : start + 5] for start in range(8)] * 3
    replies = await asyncio.gather(*(chat.append(session.id, request) for request in requests))
    seqs = {entry.id: entry.seq for reply in replies for entry in reply.messages}
    assert all(seqs[entry.id] == entry.seq for reply in replies for entry in reply.messages)
    assert sorted(seqs.values()) == list(range(1, 13))
    assert {message.id: message.seq for message in await chat.all(session.id)} == seqs


async def test_bad_append_does_not_fail_those_in_its_statement(
    chat: Chat, session: session_pb2.Session
) -> None:
    used = new_message("used")
    await chat.append(session.id, [used])
    bad = [
        chat.append(session.id, [new_message("other", id=used.id)]),
        chat.append(new_id(), "lost"),
        chat.append(session.id, "late", expected_last_seq=0),
        Chat(chat.stub, new_id()).append("", new_messages(1)),
    ]
    good = [chat.append(session.id, f"good {n}") for n in range(20)]
    *refused, _ = results = await asyncio.gather(*bad, *good, return_exceptions=True)
    assert all(isinstance(result, Exception) for result in refused[:4])
    assert sorted(
        reply.messages[0].seq for reply in results[4:] if not isinstance(reply, BaseException)
    ) == list(range(2, 22))


# --- Creating a session.


async def test_retry_of_append_without_session_finds_the_created_session(chat: Chat) -> None:
    sent = new_messages(2)
    first = await chat.append(
        "", sent, session={"title": "T", "summary": "S", "metadata": {"k": 1}}
    )
    assert first.session_created
    assert first.session_id == str(uuid.uuid5(uuid.UUID(chat.user_id), sent[0].id))
    again = await chat.append(
        "", sent, session={"title": "T", "summary": "S", "metadata": {"k": 1}}
    )
    assert (again.session_id, again.session_created, seqs_and_replays(again)) == (
        first.session_id,
        False,
        [(1, True), (2, True)],
    )
    respelled = [new_message("message 1", id=sent[0].id.upper()), sent[1]]
    assert (await chat.append("", respelled)).session_id == first.session_id
    session = await chat.get_session(first.session_id)
    assert (session.title, session.summary, dict(session.metadata)) == ("T", "S", {"k": 1})
    assert (session.last_seq, session.message_count, session.state) == (2, 2, ACTIVE)
    assert len((await chat.list_sessions()).sessions) == 1


async def test_equal_concurrent_appends_without_session_create_one_session(chat: Chat) -> None:
    sent = new_messages(2)
    replies = await asyncio.gather(*(chat.append("", sent) for _ in range(30)))
    assert len({reply.session_id for reply in replies}) == 1
    assert sum(reply.session_created for reply in replies) == 1
    assert sum(entry.replayed for reply in replies for entry in reply.messages) == 58
    assert len(await chat.all(replies[0].session_id)) == 2


async def test_same_message_id_of_two_users_creates_two_sessions(chat: Chat, other: Chat) -> None:
    sent = new_messages(1)
    assert await chat.start(sent) != await other.start(sent)


async def test_append_without_session_and_message_id_always_creates_a_session(chat: Chat) -> None:
    ids = {await chat.start([new_message("one", id="")]) for _ in range(3)}
    assert len(ids) == 3


async def test_unknown_session_is_created_only_with_create_if_missing(chat: Chat) -> None:
    session_id, sent = new_id(), new_messages(1)
    await assert_fails(chat.append(session_id, sent), "SESSION_NOT_FOUND", session_id=session_id)
    assert len((await chat.list_sessions()).sessions) == 0
    created = await chat.append(
        session_id.upper(), sent, create_if_missing=True, session={"title": "T"}
    )
    assert (created.session_id, created.session_created, seqs_and_replays(created)) == (
        session_id,
        True,
        [(1, False)],
    )
    again = await chat.append(session_id, sent, create_if_missing=True, session={"title": "U"})
    assert (again.session_created, seqs_and_replays(again)) == (False, [(1, True)])
    assert (await chat.get_session(session_id)).title == "T"


async def test_concurrent_first_appends_create_one_session(chat: Chat) -> None:
    session_id = new_id()
    replies = await asyncio.gather(
        *(chat.append(session_id, new_messages(2), create_if_missing=True) for _ in range(30))
    )
    assert sum(reply.session_created for reply in replies) == 1
    assert sorted(entry.seq for reply in replies for entry in reply.messages) == list(range(1, 61))
    created = next(reply for reply in replies if reply.session_created)
    assert created.messages[0].seq == 1


async def test_session_created_by_append_equals_one_of_create_session(
    chat: Chat,
) -> None:
    session_id = new_id()
    await chat.append(
        session_id, "hello", create_if_missing=True, session={"title": "T", "metadata": {"k": 1}}
    )
    assert (await chat.create_session(id=session_id, title="T", metadata={"k": 1})).last_seq == 1
    await assert_fails(chat.create_session(id=session_id, title="U"), "ID_TAKEN")


async def test_session_fields_are_ignored_if_the_session_exists(chat: Chat) -> None:
    session_id = (await chat.create_session(title="kept")).id
    for fields in ({}, {"create_if_missing": True}):
        await chat.append(session_id, "hello", session={"title": "ignored"}, **fields)
    assert (await chat.get_session(session_id)).title == "kept"


async def test_session_to_create_must_match_the_request(chat: Chat, other: Chat) -> None:
    session_id = new_id()
    for session, field in (
        ({"id": new_id()}, "session.id"),
        ({"user_id": other.user_id}, "session.user_id"),
        ({"state": ARCHIVED}, "session.state"),
        ({"summarized_through_seq": 1}, "session.summarized_through_seq"),
        ({"title": "a\0"}, "session.title"),
    ):
        await assert_field_violations(
            chat.append(session_id, "hello", create_if_missing=True, session=session), field
        )
    created = {"id": session_id.upper(), "user_id": chat.user_id, "state": ACTIVE}
    assert (
        await chat.append(session_id, "hello", create_if_missing=True, session=created)
    ).session_created


async def test_ids_inside_the_session_of_an_append_must_match_if_the_session_exists(
    chat: Chat, other: Chat, session: session_pb2.Session
) -> None:
    for fields in ({}, {"create_if_missing": True}):
        for ids, field in (
            ({"id": new_id()}, "session.id"),
            ({"user_id": other.user_id}, "session.user_id"),
        ):
            call = chat.append(session.id, "hello", session=ids, **fields)
            await assert_field_violations(call, field)
    ids = {"id": session.id.upper(), "user_id": chat.user_id.upper()}
    assert seqs_and_replays(await chat.append(session.id, "hello", session=ids)) == [(1, False)]


async def test_session_id_of_a_message_must_match_the_request(
    chat: Chat, session: session_pb2.Session
) -> None:
    await assert_field_violations(
        chat.append(session.id, [new_message("a"), new_message("b", session_id=new_id())]),
        "messages[1].session_id",
    )
    assert seqs_and_replays(
        await chat.append(session.id, [new_message("a", session_id=session.id.upper())])
    ) == [(1, False)]


async def test_append_for_unknown_user_is_not_found(chat: Chat) -> None:
    unknown_user = Chat(chat.stub, new_id())
    await assert_fails(
        unknown_user.append("", new_messages(1)), "USER_NOT_FOUND", user_id=unknown_user.user_id
    )
    await assert_fails(
        unknown_user.append(new_id(), new_messages(1), create_if_missing=True), "USER_NOT_FOUND"
    )
    await assert_fails(
        unknown_user.append(session_id := new_id(), new_messages(1)),
        "SESSION_NOT_FOUND",
        session_id=session_id,
    )
    await assert_field_violations(Chat(chat.stub, "").append("", new_messages(1)), "user_id")
    await assert_field_violations(
        Chat(chat.stub, SYSTEM_USER_ID).append("", new_messages(1)), "user_id"
    )


async def test_deleted_session_can_be_created_again_and_counts_from_1(chat: Chat) -> None:
    sent = new_messages(3)
    session_id = await chat.start(sent)
    await chat.delete_session(session_id)
    again = await chat.append(session_id, sent[:1], create_if_missing=True)
    assert (again.session_id, again.session_created, seqs_and_replays(again)) == (
        session_id,
        True,
        [(1, False)],
    )


# --- The order of checks: session, replay, archived, expected_last_seq.


async def test_append_with_stale_expected_seq_is_aborted_with_the_current_one(
    chat: Chat, session: session_pb2.Session
) -> None:
    assert seqs_and_replays(
        await chat.append(session.id, new_messages(2), expected_last_seq=0)
    ) == [
        (1, False),
        (2, False),
    ]
    failure = await assert_fails(
        chat.append(session.id, "x", expected_last_seq=0),
        "LAST_SEQ_MISMATCH",
        session_id=session.id,
        last_seq=2,
    )
    assert failure.retry_after is None
    await assert_fails(
        chat.append(session.id, "x", expected_last_seq=3), "LAST_SEQ_MISMATCH", last_seq=2
    )
    assert seqs_and_replays(await chat.append(session.id, "x", expected_last_seq=2)) == [(3, False)]


async def test_one_of_concurrent_appends_with_equal_expected_seq_succeeds(
    chat: Chat, session: session_pb2.Session
) -> None:
    results = await asyncio.gather(
        *(chat.append(session.id, new_messages(2), expected_last_seq=0) for _ in range(20)),
        return_exceptions=True,
    )
    won = [result for result in results if isinstance(result, message_pb2.AppendMessagesResponse)]
    assert len(won) == 1
    assert [message.id for message in await chat.all(session.id)] == [
        entry.id for entry in won[0].messages
    ]


async def test_deleted_message_counts_for_expected_seq(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(2))
    await chat.delete(session_id, sent[1].id)
    await assert_fails(
        chat.append(session_id, "x", expected_last_seq=1), "LAST_SEQ_MISMATCH", last_seq=2
    )
    assert seqs_and_replays(await chat.append(session_id, "x", expected_last_seq=2)) == [(3, False)]


async def test_session_to_create_has_expected_seq_0(chat: Chat) -> None:
    session_id = new_id()
    wrong = chat.append(session_id, new_messages(1), create_if_missing=True, expected_last_seq=1)
    await assert_fails(wrong, "LAST_SEQ_MISMATCH", session_id=session_id, last_seq=0)
    await assert_fails(chat.get_session(session_id), "SESSION_NOT_FOUND")
    created = await chat.append(
        session_id, new_messages(1), create_if_missing=True, expected_last_seq=0
    )
    assert created.session_created
    assert (await chat.append("", new_messages(1), expected_last_seq=0)).session_created


async def test_missing_session_is_reported_before_other_errors(chat: Chat) -> None:
    elsewhere = await chat.start(sent := new_messages(1))
    await assert_fails(
        chat.append(new_id(), [new_message("other", id=sent[0].id)], expected_last_seq=9),
        "SESSION_NOT_FOUND",
    )
    assert len(await chat.all(elsewhere)) == 1


async def test_append_of_replays_only_always_succeeds(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(3))
    assert seqs_and_replays(await chat.append(session_id, sent[:2], expected_last_seq=0)) == [
        (1, True),
        (2, True),
    ]
    await chat.update_session(id=session_id, state=ARCHIVED)
    assert seqs_and_replays(await chat.append(session_id, sent)) == [
        (1, True),
        (2, True),
        (3, True),
    ]
    assert seqs_and_replays(await chat.append(session_id, sent, expected_last_seq=77)) == [
        (1, True),
        (2, True),
        (3, True),
    ]
    assert seqs_and_replays(await chat.append("", sent)) == [(1, True), (2, True), (3, True)]


async def test_reused_id_is_reported_before_archived_and_expected_seq(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(2))
    wrong = [new_message("new"), new_message("other", id=sent[0].id)]
    await assert_fails(chat.append(session_id, wrong, expected_last_seq=0), "MESSAGE_ID_REUSED")
    await chat.update_session(id=session_id, state=ARCHIVED)
    await assert_fails(chat.append(session_id, wrong, expected_last_seq=0), "MESSAGE_ID_REUSED")


async def test_archived_is_reported_before_expected_seq(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(2))
    await chat.update_session(id=session_id, state=ARCHIVED)
    for request in ([new_message("new")], [sent[0], new_message("new")]):
        await assert_fails(
            chat.append(session_id, request, expected_last_seq=0),
            "SESSION_ARCHIVED",
            session_id=session_id,
        )
        await assert_fails(chat.append(session_id, request), "SESSION_ARCHIVED")
        await assert_fails(
            chat.append(session_id, request, create_if_missing=True), "SESSION_ARCHIVED"
        )
    assert len(await chat.all(session_id)) == 2


async def test_expected_seq_applies_to_mixed_appends(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(2))
    await assert_fails(
        chat.append(session_id, [sent[1], new_message("new")], expected_last_seq=1),
        "LAST_SEQ_MISMATCH",
        last_seq=2,
    )
    assert seqs_and_replays(
        await chat.append(session_id, [sent[1], new_message("new")], expected_last_seq=2)
    ) == [
        (2, True),
        (3, False),
    ]


# --- The stored rows.


async def test_session_counts_match_its_messages(chat: Chat, database_url: str) -> None:
    session_ids = [await chat.start() for _ in range(3)]
    appends = [
        chat.append(session_id, new_messages(n)) for n in (1, 2, 3) for session_id in session_ids
    ]
    await asyncio.gather(*appends)
    rows = await fetch(
        database_url,
        """SELECT s.last_seq, s.message_count, count(m), min(m.seq), max(m.seq),
                  max(m.created_at) = s.updated_at AS at
           FROM chat_sessions AS s JOIN chat_messages AS m ON m.session_id = s.id
           GROUP BY s.user_id, s.id""",
    )
    assert [tuple(row) for row in rows] == [(7, 7, 7, 1, 7, True)] * 3
