"""Sessions: created once, listed by activity, updated with their etag, forked and deleted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2
from google.protobuf.field_mask_pb2 import FieldMask

from service.server import Server
from service.store import sessions, slices
from tests.support.chat import ASSISTANT, SYSTEM, Chat, new_id, new_message, new_messages
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations, failure_of

ACTIVE, ARCHIVED = session_pb2.SESSION_STATE_ACTIVE, session_pb2.SESSION_STATE_ARCHIVED


# --- Creating.


async def test_created_session_is_returned_as_sent(chat: Chat) -> None:
    session = await chat.create_session(
        title="Plans", summary="so far", metadata={"topic": {"deep": [1, "x", None]}}
    )
    assert (session.user_id, session.title, session.summary, session.state) == (
        chat.user_id,
        "Plans",
        "so far",
        ACTIVE,
    )
    assert (session.last_seq, session.message_count, session.summarized_through_seq) == (0, 0, 0)
    # Each is the database's clock when its column was filled; a busy machine may pause in between.
    assert (
        0
        <= session.update_time.ToMicroseconds() - session.create_time.ToMicroseconds()
        < 10_000_000
    )
    assert session.id[14] == "7"
    assert not session.HasField("forked_from")
    assert await chat.get_session(session.id.upper()) == session


async def test_session_can_be_created_without_fields(chat: Chat) -> None:
    reply = await chat.stub.CreateSession(session_pb2.CreateSessionRequest(user_id=chat.user_id))
    assert (reply.session.title, reply.session.state) == ("", ACTIVE)
    assert not reply.session.HasField("metadata")


async def test_session_can_be_created_archived(chat: Chat) -> None:
    assert (await chat.create_session(state=ARCHIVED)).state == ARCHIVED


async def test_retry_of_create_returns_the_session(chat: Chat) -> None:
    sent: dict[str, Any] = {"id": new_id(), "title": "T", "metadata": {"a": 1, "b": [2]}}
    first = await chat.create_session(**sent)
    assert await chat.create_session(**sent) == first
    assert (
        await chat.create_session(**sent | {"id": sent["id"].upper(), "user_id": chat.user_id})
        == first
    )
    echoed = session_pb2.CreateSessionRequest(user_id=chat.user_id)
    echoed.session.CopyFrom(first)
    echoed.session.ClearField("state")
    assert (await chat.stub.CreateSession(echoed)).session == first
    assert len((await chat.list_sessions()).sessions) == 1


async def test_retry_of_create_returns_the_current_session(
    chat: Chat,
) -> None:
    sent = {"id": new_id(), "title": "before"}
    await chat.create_session(**sent)
    await chat.append(sent["id"], new_messages(3))
    changed = await chat.update_session(id=sent["id"], title="after")
    again = await chat.create_session(**sent)
    assert again == changed
    assert (again.title, again.last_seq) == ("after", 3)


@pytest.mark.parametrize(
    "change", [{"title": "U"}, {"summary": "s"}, {"metadata": {"a": 2}}, {"state": ARCHIVED}]
)
async def test_create_with_the_same_id_and_other_content_fails(
    chat: Chat, change: dict[str, Any]
) -> None:
    sent: dict[str, Any] = {"id": new_id(), "title": "T", "metadata": {"a": 1}}
    await chat.create_session(**sent)
    await assert_fails(chat.create_session(**sent | change), "ID_TAKEN", session_id=sent["id"])


async def test_retry_of_create_ignores_the_order_of_metadata_keys(chat: Chat) -> None:
    session_id = new_id()
    first = await chat.create_session(id=session_id, metadata={"a": 1, "b": 2, "c": 3})
    assert await chat.create_session(id=session_id, metadata={"c": 3, "b": 2, "a": 1}) == first


async def test_concurrent_equal_creates_create_one_session(chat: Chat) -> None:
    session_id = new_id()
    created = await asyncio.gather(
        *(chat.create_session(id=session_id, title="T") for _ in range(20))
    )
    assert len({session.SerializeToString(deterministic=True) for session in created}) == 1


async def test_create_that_races_with_a_deletion_creates_the_session(
    chat: Chat, server: Server
) -> None:
    """The session that an insert conflicted with may be gone when the insert's caller reads it."""
    session = await chat.create_session(id=new_id(), title="first")
    values = {"user_id": chat.user_id, "id": session.id, "title": "again", "fingerprint": b"again"}
    find, races = sessions.find, 0

    async def find_after_deletion(*args: Any) -> Any:
        nonlocal races
        if not races:
            await chat.delete_session(session.id)
        races += 1
        return await find(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "find", find_after_deletion)
        row = await server.database.write(
            lambda connection: sessions.create(connection, values),
            owner_id=chat.user_id,
            deadline=asyncio.get_running_loop().time() + 30,
        )
    assert (row.title, races) == ("again", 1)


async def test_create_session_of_an_unknown_user_fails(chat: Chat) -> None:
    unknown = Chat(chat.stub, new_id())
    await assert_fails(unknown.create_session(), "USER_NOT_FOUND", user_id=unknown.user_id)
    await assert_field_violations(Chat(chat.stub, "").create_session(), "user_id")


async def test_user_id_inside_a_session_must_match_the_request(chat: Chat, other: Chat) -> None:
    await assert_field_violations(chat.create_session(user_id=other.user_id), "session.user_id")
    session = await chat.create_session(user_id=chat.user_id.upper())
    await assert_field_violations(
        chat.update_session(id=session.id, user_id=other.user_id, title="x"), "session.user_id"
    )


async def test_new_session_with_summarized_through_seq_is_rejected(chat: Chat) -> None:
    await assert_field_violations(
        chat.create_session(summary="s", summarized_through_seq=1), "session.summarized_through_seq"
    )


# --- Owners.


async def test_two_users_can_have_sessions_with_the_same_id(chat: Chat, other: Chat) -> None:
    session_id = new_id()
    mine = await chat.create_session(id=session_id, title="mine")
    theirs = await other.create_session(id=session_id, title="theirs")
    await chat.append(session_id, "hello")
    await other.delete_session(session_id)
    assert theirs.title == "theirs"
    assert (await chat.get_session(session_id)).title == mine.title
    assert [message.content for message in await chat.all(session_id)] == ["hello"]


async def test_session_of_another_user_fails_exactly_like_a_missing_one(
    chat: Chat, other: Chat
) -> None:
    theirs, never = await other.start(new_messages(2)), new_id()
    sent = (await other.all(theirs))[0].id

    def calls(session_id: str) -> list[Any]:
        return [
            chat.get_session(session_id),
            chat.update_session(id=session_id, title="x"),
            chat.delete_session(session_id),
            chat.fork(session_id, 1),
            chat.append(session_id, "x"),
            chat.get(session_id, sent),
            chat.page(session_id),
            chat.update(session_id, sent, content="x"),
            chat.delete(session_id, sent),
            chat.context(session_id),
            anext(aiter(chat.watch(session_id))),
        ]

    for foreign, missing in zip(calls(theirs), calls(never), strict=True):
        foreign_failure = await assert_fails(foreign, "SESSION_NOT_FOUND", session_id=theirs)
        two = await assert_fails(missing, "SESSION_NOT_FOUND", session_id=never)
        assert foreign_failure == two._replace(metadata=foreign_failure.metadata)
        assert set(foreign_failure.metadata) == set(two.metadata)
    assert [message.content for message in await other.all(theirs)] == ["message 1", "message 2"]
    assert (await other.get_session(theirs)).title == ""


# --- Listing.


async def ids(chat: Chat, **fields: Any) -> list[str]:
    return [session.id async for page in chat.session_pages(**fields) for session in page]


async def test_sessions_are_listed_by_newest_activity(chat: Chat) -> None:
    first, second, third = [(await chat.create_session()).id for _ in range(3)]
    assert await ids(chat) == [third, second, first]
    await chat.append(first, "hello")
    assert await ids(chat) == [first, third, second]
    await chat.update_session(id=second, title="x")
    assert await ids(chat) == [second, first, third]


async def test_list_contains_no_sessions_of_other_users(chat: Chat, other: Chat) -> None:
    mine = [(await chat.create_session()).id for _ in range(2)]
    await other.create_session()
    assert await ids(chat) == mine[::-1]
    assert await ids(Chat(chat.stub, new_id())) == []


async def test_list_can_be_filtered_by_state(chat: Chat) -> None:
    active = (await chat.create_session()).id
    archived = (await chat.create_session(state=ARCHIVED)).id
    assert await ids(chat, state=ACTIVE) == [active]
    assert await ids(chat, state=ARCHIVED) == [archived]
    assert await ids(chat) == [archived, active]
    await chat.update_session(id=active, state=ARCHIVED)
    assert await ids(chat, state=ACTIVE) == []


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 30])
async def test_pages_of_sessions_with_equal_times_have_no_gap_or_overlap(
    chat: Chat, database_url: str, page_size: int
) -> None:
    await asyncio.gather(*(chat.create_session() for _ in range(15)))
    # Three times only, so that most page boundaries are between sessions of the same time.
    await fetch(
        database_url,
        "UPDATE chat_sessions SET updated_at = '2026-01-01'::timestamptz"
        " + (get_byte(uuid_send(id), 15) % 3) * interval '1 us'",
    )
    expected = await fetch(
        database_url, "SELECT id::text FROM chat_sessions ORDER BY updated_at DESC, id DESC"
    )
    pages = [
        [session.id for session in page] async for page in chat.session_pages(page_size=page_size)
    ]
    assert [session_id for page in pages for session_id in page] == [row["id"] for row in expected]
    assert all(len(page) == page_size for page in pages[:-1])
    assert pages[-1]


async def test_paging_during_appends_lists_each_inactive_session_once(chat: Chat) -> None:
    quiet = [(await chat.create_session()).id for _ in range(12)]
    busy = [(await chat.create_session()).id for _ in range(4)]
    seen: list[str] = []
    async for page in chat.session_pages(page_size=2):
        seen += [session.id for session in page]
        await asyncio.gather(
            *(chat.append(session_id, "more") for session_id in busy), chat.create_session()
        )
    assert [session_id for session_id in seen if session_id in quiet] == quiet[::-1]
    # A session that becomes active moves to the front, before the cursor of the next page.
    assert all(seen.count(session_id) <= 1 for session_id in busy)


# --- Updating.


async def test_empty_mask_writes_every_field_that_is_set(chat: Chat) -> None:
    session = await chat.create_session(title="T", summary="S", metadata={"k": 1})
    changed = await chat.update_session(id=session.id, title="U", state=ARCHIVED)
    assert (changed.title, changed.summary, changed.state) == ("U", "S", ARCHIVED)
    assert changed.metadata["k"] == 1
    assert await chat.get_session(session.id) == changed


async def test_mask_writes_only_its_fields_and_clears_empty_ones(chat: Chat) -> None:
    session = await chat.create_session(title="T", summary="S", metadata={"k": 1})
    changed = await chat.update_session(
        ("summary", "metadata"), id=session.id, title="ignored", state=ARCHIVED
    )
    assert (changed.title, changed.summary, changed.state) == ("T", "", ACTIVE)
    assert not changed.HasField("metadata")


@pytest.mark.parametrize(
    "path",
    [
        "id",
        "user_id",
        "last_seq",
        "message_count",
        "create_time",
        "etag",
        "forked_from",
        "nope",
        "metadata.k",
    ],
)
async def test_mask_with_an_unwritable_field_is_rejected(chat: Chat, path: str) -> None:
    session = await chat.create_session()
    await assert_field_violations(
        chat.update_session(("title", path), id=session.id, title="U"), "update_mask"
    )
    assert await chat.get_session(session.id) == session


async def test_update_of_state_to_unspecified_is_rejected(chat: Chat) -> None:
    session = await chat.create_session()
    await assert_field_violations(chat.update_session(("state",), id=session.id), "session.state")


async def test_update_requires_a_session_id(chat: Chat) -> None:
    await assert_field_violations(chat.update_session(title="x"), "session.id")
    request = session_pb2.UpdateSessionRequest(
        user_id=chat.user_id, update_mask=FieldMask(paths=["title"])
    )
    await assert_field_violations(chat.stub.UpdateSession(request), "session")


async def test_summarized_through_seq_above_last_seq_is_rejected(chat: Chat) -> None:
    session_id = await chat.start(new_messages(3))
    await assert_field_violations(
        chat.update_session(id=session_id, summary="s", summarized_through_seq=4),
        "session.summarized_through_seq",
    )
    changed = await chat.update_session(id=session_id, summary="s", summarized_through_seq=3)
    assert (changed.summary, changed.summarized_through_seq) == ("s", 3)


async def test_update_with_stale_etag_is_aborted(
    chat: Chat,
) -> None:
    session = await chat.create_session()
    second = await chat.update_session(id=session.id, title="B", etag=session.etag)
    assert second.etag != session.etag
    failure = await assert_fails(
        chat.update_session(id=session.id, title="C", etag=session.etag), "ETAG_MISMATCH"
    )
    assert failure.metadata["etag"] == second.etag
    assert await chat.get_session(session.id) == second


async def test_one_of_concurrent_updates_with_one_etag_succeeds(chat: Chat) -> None:
    session = await chat.create_session()
    results = await asyncio.gather(
        *(chat.update_session(id=session.id, title=f"{n}", etag=session.etag) for n in range(8)),
        return_exceptions=True,
    )
    won = [result for result in results if isinstance(result, session_pb2.Session)]
    assert len(won) == 1
    assert await chat.get_session(session.id) == won[0]


async def test_etag_of_a_deleted_session_does_not_match_its_successor(chat: Chat) -> None:
    first = await chat.create_session()
    await chat.delete_session(first.id)
    await chat.create_session(id=first.id)
    await assert_fails(
        chat.update_session(id=first.id, title="x", etag=first.etag), "ETAG_MISMATCH"
    )


async def test_update_with_etag_succeeds_while_messages_are_appended(chat: Chat) -> None:
    session_id = await chat.start()
    session = await chat.get_session(session_id)
    done = asyncio.Event()

    async def talk() -> int:
        count = 0
        while not done.is_set():
            await chat.append(session_id, f"message {count}")
            count += 1
        return count

    talkers = [asyncio.create_task(talk()) for _ in range(4)]
    for number in range(10):
        session = await chat.update_session(
            id=session_id, title=f"title {number}", etag=session.etag
        )
    done.set()
    counts = await asyncio.gather(*talkers)
    after = await chat.get_session(session_id)
    assert (after.title, after.etag) == ("title 9", session.etag)
    assert after.last_seq == after.message_count == sum(counts) + 1
    assert after.last_seq > session.last_seq or session.last_seq == after.last_seq


async def test_append_changes_counts_and_time_but_not_the_etag(chat: Chat) -> None:
    before = await chat.create_session()
    reply = await chat.append(before.id, new_messages(2))
    after = await chat.get_session(before.id)
    assert (after.last_seq, after.message_count, after.etag) == (2, 2, before.etag)
    assert after.update_time == reply.messages[-1].create_time
    assert after.update_time.ToMicroseconds() >= before.update_time.ToMicroseconds()


async def test_archived_session_can_be_read_updated_and_reactivated(chat: Chat) -> None:
    session_id = await chat.start(new_messages(2))
    first = (await chat.all(session_id))[0].id
    await chat.update_session(id=session_id, state=ARCHIVED)
    await assert_fails(chat.append(session_id, "more"), "SESSION_ARCHIVED", session_id=session_id)
    assert len(await chat.all(session_id)) == 2
    assert len((await chat.context(session_id)).messages) == 2
    await chat.update(session_id, first, content="edited")
    await chat.delete(session_id, first)
    await chat.update_session(id=session_id, title="kept")
    await chat.fork(session_id, 2)
    await chat.update_session(id=session_id, state=ACTIVE)
    assert (await chat.append(session_id, "more")).messages[0].seq == 3


# --- Deleting.


async def count(url: str, session_id: str) -> int:
    rows = await fetch(url, "SELECT count(*) FROM chat_messages WHERE session_id = $1", session_id)
    return int(rows[0][0])


@pytest.mark.parametrize("slice_size", [slices.MESSAGES_PER_DELETE, 4])
async def test_deletion_of_a_session_deletes_its_messages_only(
    chat: Chat, other: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch, slice_size: int
) -> None:
    monkeypatch.setattr(slices, "MESSAGES_PER_DELETE", slice_size)
    deleted, kept = await chat.start(new_messages(13)), await chat.start(new_messages(13))
    same_id = (await other.create_session(id=deleted)).id
    await other.append(same_id, new_messages(13))
    await chat.delete(deleted, (await chat.all(deleted))[5].id)
    await chat.delete_session(deleted)
    await assert_fails(chat.get_session(deleted), "SESSION_NOT_FOUND", session_id=deleted)
    await assert_fails(chat.all(deleted), "SESSION_NOT_FOUND")
    assert [session.id for session in (await chat.list_sessions()).sessions] == [kept]
    assert len(await chat.all(kept)) == len(await other.all(same_id)) == 13
    assert await count(database_url, deleted) == 13


async def test_deletion_of_a_missing_session_needs_allow_missing(chat: Chat) -> None:
    missing = new_id()
    await assert_fails(chat.delete_session(missing), "SESSION_NOT_FOUND", session_id=missing)
    await chat.delete_session(missing, allow_missing=True)
    session_id = await chat.start()
    await chat.delete_session(session_id, allow_missing=True)
    await assert_fails(chat.delete_session(session_id), "SESSION_NOT_FOUND")


async def test_id_of_a_deleted_session_can_be_reused(chat: Chat) -> None:
    sent = new_messages(3)
    session_id = await chat.start(sent)
    await chat.delete_session(session_id)
    again = await chat.create_session(id=session_id)
    assert (again.last_seq, again.message_count) == (0, 0)
    reply = await chat.append(session_id, sent)
    assert [(message.seq, message.replayed) for message in reply.messages] == [
        (1, False),
        (2, False),
        (3, False),
    ]


async def test_partly_deleted_session_has_right_counts_and_can_be_deleted(
    chat: Chat, database_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MESSAGES_PER_DELETE", 4)
    session_id = await chat.start(new_messages(10))
    deadline = asyncio.get_running_loop().time() + 10
    erased = await server.database.write(
        slices.message_slices(chat.user_id, session_id).delete_next,
        owner_id=chat.user_id,
        deadline=deadline,
    )
    assert erased == 4
    assert (
        (await chat.get_session(session_id)).message_count == len(await chat.all(session_id)) == 6
    )
    assert (await chat.append(session_id, "more")).messages[0].seq == 11
    await chat.delete_session(session_id)
    assert await count(database_url, session_id) == 0


# --- Forking.


def bare(message: message_pb2.Message) -> message_pb2.Message:
    """Return a message without the fields that differ between a fork and its source."""
    copy = message_pb2.Message()
    copy.CopyFrom(message)
    copy.ClearField("session_id")
    return copy


async def test_fork_copies_messages_with_ids_seqs_and_times(chat: Chat) -> None:
    source = await chat.start(
        [
            new_message("be kind", SYSTEM, metadata={"k": [1]}, author="app"),
            new_message("hello", token_count=7, feedback={"score": 0.5, "comment": "c"}),
            new_message(
                "look",
                ASSISTANT,
                parts=[{"tool_call": {"id": "c1", "name": "f", "arguments": "{}"}}],
            ),
            *new_messages(3),
        ],
        session={"title": "T", "metadata": {"k": "v"}},
    )
    original = await chat.all(source)
    await chat.update(source, original[1].id, content="edited")
    original = await chat.all(source)
    before = await chat.get_session(source)
    fork = await chat.fork(source, 4)
    assert fork.id != source
    assert (fork.title, fork.state, dict(fork.metadata)) == ("T", ACTIVE, {"k": "v"})
    assert (fork.last_seq, fork.message_count) == (4, 4)
    assert (fork.forked_from.session_id, fork.forked_from.seq) == (source, 4)
    assert await chat.get_session(fork.id) == fork
    copies = await chat.all(fork.id)
    assert [bare(message) for message in copies] == [bare(message) for message in original[:4]]
    assert {message.session_id for message in copies} == {fork.id}
    assert await chat.get_session(source) == before
    assert await chat.all(source) == original


async def test_fork_and_source_are_independent(chat: Chat) -> None:
    source = await chat.start(sent := new_messages(4))
    fork = await chat.fork(source, 2)
    assert (await chat.append(fork.id, "other way")).messages[0].seq == 3
    await chat.update(fork.id, sent[0].id, content="edited in the fork")
    await chat.delete(fork.id, sent[1].id)
    assert [message.content for message in await chat.all(source)] == [
        f"message {n}" for n in (1, 2, 3, 4)
    ]
    await chat.delete_session(source)
    assert [message.content for message in await chat.all(fork.id)] == [
        "edited in the fork",
        "other way",
    ]


async def test_fork_keeps_tombstones(chat: Chat) -> None:
    sent = new_messages(5)
    source = await chat.start(sent)
    await chat.delete(source, sent[1].id)
    await chat.delete(source, sent[3].id)
    fork = await chat.fork(source, 4)
    assert (fork.last_seq, fork.message_count) == (4, 2)
    assert [message.seq for message in await chat.all(fork.id)] == [1, 3]
    await assert_fails(chat.get(fork.id, sent[1].id), "MESSAGE_NOT_FOUND")
    retry = await chat.append(fork.id, [sent[3]])
    assert [(message.seq, message.replayed) for message in retry.messages] == [(4, True)]
    await assert_fails(chat.get(fork.id, sent[3].id), "MESSAGE_NOT_FOUND")
    assert (await chat.append(fork.id, "next")).messages[0].seq == 5


async def test_retry_of_an_append_is_recognised_in_a_fork(chat: Chat) -> None:
    sent = new_messages(3)
    source = await chat.start(sent)
    fork = await chat.fork(source, 2)
    reply = await chat.append(fork.id, sent)
    assert [(message.seq, message.replayed) for message in reply.messages] == [
        (1, True),
        (2, True),
        (3, False),
    ]


@pytest.mark.parametrize(
    ("through", "summary", "covered"), [(2, "", 0), (3, "so far", 3), (5, "so far", 3)]
)
async def test_fork_keeps_a_summary_within_its_messages(
    chat: Chat, through: int, summary: str, covered: int
) -> None:
    source = await chat.start(new_messages(5))
    await chat.update_session(id=source, summary="so far", summarized_through_seq=3)
    fork = await chat.fork(source, through)
    assert (fork.summary, fork.summarized_through_seq) == (summary, covered)


async def test_fork_through_seq_must_be_within_the_source(chat: Chat) -> None:
    source = await chat.start(new_messages(3))
    empty = await chat.fork(source, 0)
    assert (empty.last_seq, empty.message_count, empty.forked_from.session_id) == (0, 0, source)
    assert (await chat.append(empty.id, "first")).messages[0].seq == 1
    await assert_field_violations(chat.fork(source, 4), "through_seq")
    await assert_field_violations(chat.fork(source, -1), "through_seq")
    assert (await chat.fork(source, 3)).message_count == 3


async def test_fork_with_a_client_chosen_id_can_be_retried(chat: Chat) -> None:
    source = await chat.start(new_messages(3))
    new = new_id()
    first = await chat.fork(source, 2, new)
    assert await chat.fork(source, 2, new.upper()) == first
    await chat.append(new, "more")
    again = await chat.fork(source, 2, new)
    assert (again.last_seq, again.message_count) == (3, 3)
    assert [message.seq for message in await chat.all(new)] == [1, 2, 3]
    await assert_fails(chat.fork(source, 3, new), "ID_TAKEN", session_id=new)
    await assert_fails(chat.fork(source, 2, source), "ID_TAKEN", session_id=source)
    await chat.append(source, "and on")
    await assert_fails(chat.fork(source, 4, new), "ID_TAKEN")


async def test_retry_of_a_fork_succeeds_after_deletion_of_the_source(chat: Chat) -> None:
    source = await chat.start(new_messages(3))
    new = new_id()
    first = await chat.fork(source, 2, new)
    await chat.delete_session(source)
    assert await chat.fork(source, 2, new) == first
    await assert_fails(chat.fork(source, 2), "SESSION_NOT_FOUND", session_id=source)


async def test_retry_of_an_empty_fork_returns_the_current_session(chat: Chat) -> None:
    source = (await chat.create_session(metadata={"k": "source"})).id
    new = new_id()
    assert dict((await chat.fork(source, 0, new)).metadata) == {"k": "source"}
    changed = await chat.update_session(id=new, metadata={"k": "changed"})
    assert await chat.fork(source, 0, new) == changed

    async def talk() -> None:
        for number in range(20):
            await chat.append(new, f"message {number}")

    talking = asyncio.create_task(talk())
    for _ in range(10):
        await chat.fork(source, 0, new)
    await talking
    assert [message.seq for message in await chat.all(new)] == list(range(1, 21))


async def test_concurrent_equal_forks_create_one_session(chat: Chat) -> None:
    source = await chat.start(new_messages(5))
    new = new_id()
    forks = await asyncio.gather(*(chat.fork(source, 5, new) for _ in range(10)))
    assert {fork.SerializeToString(deterministic=True) for fork in forks} == {
        forks[0].SerializeToString(deterministic=True)
    }
    assert len(await chat.all(new)) == 5


async def test_fork_during_appends_copies_exactly_the_requested_messages(chat: Chat) -> None:
    source = await chat.start(new_messages(5))

    async def talk() -> None:
        for number in range(20):
            await chat.append(source, f"more {number}")

    talking = asyncio.create_task(talk())
    forks = [await chat.fork(source, 5) for _ in range(10)]
    await talking
    for fork in forks:
        assert (fork.last_seq, fork.message_count) == (5, 5)
        assert [message.seq for message in await chat.all(fork.id)] == [1, 2, 3, 4, 5]


async def test_create_time_in_a_fork_does_not_precede_copied_messages(
    chat: Chat, database_url: str
) -> None:
    source = await chat.start(new_messages(2))
    await fetch(
        database_url,
        "UPDATE chat_messages SET created_at = '2100-01-01' WHERE session_id = $1",
        source,
    )
    fork = await chat.fork(source, 2)
    await chat.append(fork.id, "next")
    times = [message.create_time.ToMicroseconds() for message in await chat.all(fork.id)]
    assert times == sorted(times)


async def test_session_of_another_user_cannot_be_forked(chat: Chat, other: Chat) -> None:
    theirs = await other.start(new_messages(2))
    failure = await failure_of(chat.fork(theirs, 1))
    assert failure.reason == "SESSION_NOT_FOUND"
    assert await ids(chat) == []
    # If both users have a session with this id, each forks their own.
    mine = await chat.create_session(id=theirs)
    assert (await chat.fork(mine.id, 0)).message_count == 0
    await assert_field_violations(chat.fork(mine.id, 1), "through_seq")
