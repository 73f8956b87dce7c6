"""Messages: returned as they were sent, updated with their etag, deleted to a tombstone."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store.token_estimate import estimate_tokens
from tests.support.chat import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Chat,
    new_id,
    new_message,
    new_messages,
)
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations

# Everything that PostgreSQL's text can store: no NUL, and no lone surrogates, as in UTF-8.
anything = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
# PostgreSQL's numbers have no -0, which equals 0.
finite = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)
numbers = st.one_of(finite, st.integers(-(2**53), 2**53).map(float))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, anything),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(anything, inner, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(anything, json_values, max_size=5)

INJECTIONS = [
    "'; DROP TABLE chat_messages; --",
    '"); DELETE FROM users; --',
    "$1 $2 %s %(user_id)s :user_id ? {0}",
    "\\'; SELECT pg_sleep(10); --",
    "\\u0000 \\x00 \\0 \\\\",
    "NULL",
    "{}",
    "1e999",
    "<script>alert(1)</script>",
    "👩‍👩‍👧‍👦 \uff46\uff55\uff4c\uff4c \u202e right to left \u200b\ufeff \U0010ffff",
    "e\u0301 is not \u00e9",
    " \t\r\n leading and trailing \n\r\t ",
]


def struct(value: dict[str, Any]) -> Struct:
    struct_ = Struct()
    struct_.update(value)
    return struct_


def part(**kind: Any) -> message_pb2.Part:
    return message_pb2.Part(**kind)


def all_parts() -> list[message_pb2.Part]:
    """Return a part of each kind, with all fields and with none."""
    return [
        part(text="a text"),
        part(text=""),
        part(tool_call={"id": "c", "name": "f", "arguments": '{"a": 1,  "b": "\\n"}'}),
        part(tool_call={"id": "c2"}),
        part(tool_result={"tool_call_id": "c", "content": "done", "is_error": True}),
        part(tool_result={"tool_call_id": "c2"}),
        part(
            file={"uri": "s3://b/k", "mime_type": "image/png", "name": "k", "size_bytes": 2**53 + 1}
        ),
        part(file={}),
        part(citation={"document_id": new_id(), "chunk_index": 3, "quote": "so"}),
        part(citation={}),
        part(data=struct({"a": [1, None, {"b": True}], "": ""})),
        part(data=struct({})),
    ]


async def test_every_field_of_a_message_is_returned(chat: Chat) -> None:
    sent = new_message(
        "content",
        ASSISTANT,
        parts=all_parts(),
        metadata={"k": {"n": [1, 2.5, None, "x"]}},
        token_count=12,
        author="Ada",
        feedback={"score": -0.25, "comment": "meh"},
    )
    reply = await chat.append("", [sent])
    got = await chat.get(reply.session_id, sent.id)
    assert got.seq == 1
    assert got.session_id == reply.session_id
    assert got.create_time == got.update_time == reply.messages[0].create_time
    assert got.etag
    for name in ("session_id", "seq", "create_time", "update_time", "etag"):
        got.ClearField(name)
    assert got == sent
    assert [part.WhichOneof("kind") for part in got.parts] == [
        part.WhichOneof("kind") for part in sent.parts
    ]


async def test_message_is_the_same_in_every_read(chat: Chat) -> None:
    sent = new_message(
        "content", ASSISTANT, parts=all_parts()[:2], metadata={"k": 1}, feedback={"score": 1}
    )
    session_id = await chat.start([sent])
    got = await chat.get(session_id, sent.id.upper())
    assert await chat.all(session_id) == [got]
    assert await chat.all(session_id, order="MESSAGE_ORDER_DESC") == [got]
    assert list((await chat.context(session_id)).messages) == [got]
    watch = chat.watch(session_id)
    assert (await watch.read()).message == got
    watch.cancel()


async def test_message_needs_only_a_role(chat: Chat) -> None:
    for role in (USER, ASSISTANT, SYSTEM, TOOL):
        sent = new_message("", role)
        got = await chat.get(await chat.start([sent]), sent.id)
        assert (got.role, got.content, list(got.parts), got.author) == (role, "", [], "")
        assert not any(got.HasField(name) for name in ("metadata", "token_count", "feedback"))


async def test_token_count_of_zero_differs_from_none(chat: Chat) -> None:
    sent = [new_message("four words of it"), new_message("four words of it", token_count=0)]
    session_id = await chat.start(sent)
    none, zero = await chat.all(session_id)
    assert not none.HasField("token_count")
    assert zero.HasField("token_count")
    assert (await chat.context(session_id)).token_count == estimate_tokens("four words of it", None)


@pytest.mark.parametrize("value", INJECTIONS)
async def test_text_is_stored_verbatim(chat: Chat, value: str) -> None:
    sent = new_message(
        value,
        metadata={value: [value, {value: value}]},
        author=value,
        feedback={"comment": value},
        parts=[
            {"text": value},
            {"tool_call": {"id": value, "name": value, "arguments": value}},
            {"tool_result": {"tool_call_id": value, "content": value}},
            {"file": {"uri": value, "mime_type": value, "name": value}},
            {"citation": {"quote": value}},
        ],
    )
    session_id = await chat.start(
        [sent], session={"title": value, "summary": value, "metadata": {value: value}}
    )
    got = await chat.get(session_id, sent.id)
    assert (got.content, got.author, got.feedback.comment) == (value, value, value)
    assert got.metadata == sent.metadata
    assert list(got.parts) == list(sent.parts)
    session = await chat.get_session(session_id)
    assert (session.title, session.summary, dict(session.metadata)) == (
        value,
        value,
        {value: value},
    )
    changed = await chat.update(session_id, sent.id, content=value + value)
    assert changed.content == value + value


async def test_arbitrary_texts_and_structs_are_returned(chat: Chat) -> None:
    loop = asyncio.get_running_loop()

    @given(anything, objects, st.lists(st.one_of(anything, objects), max_size=4))
    @settings(max_examples=60)
    def comes_back(
        content: str, metadata: dict[str, Any], parts: list[str | dict[str, Any]]
    ) -> None:
        sent = new_message(
            content,
            parts=[{"text": part} if isinstance(part, str) else {"data": part} for part in parts],
        )
        sent.metadata.update(metadata)

        async def there_and_back() -> message_pb2.Message:
            return await chat.get(await chat.start([sent]), sent.id)

        got = asyncio.run_coroutine_threadsafe(there_and_back(), loop).result(30)
        assert got.content == content
        # An empty Struct becomes unset; nothing else is lost, not even a number's last bit.
        assert got.metadata == sent.metadata
        assert list(got.parts) == list(sent.parts)

    await asyncio.to_thread(comes_back)


@pytest.mark.parametrize(
    "number",
    [0.1, 1 / 3, -0.0, 1e-320, 1.7976931348623157e308, 5e-324, 2.0**63, 123456789012345680.0, 1e22],
)
async def test_number_in_metadata_keeps_its_last_bit(chat: Chat, number: float) -> None:
    sent = new_message("x", metadata={"n": number}, parts=[{"data": {"n": number}}])
    got = await chat.get(await chat.start([sent]), sent.id)
    assert got.metadata["n"] == got.parts[0].data["n"] == number


# --- Times.


async def test_create_time_is_the_servers_and_follows_seq(chat: Chat) -> None:
    sent = new_messages(3)
    sent[1].create_time.seconds = 1
    session_id = await chat.start(sent)
    for _ in range(3):
        await asyncio.gather(*(chat.append(session_id, new_messages(2)) for _ in range(4)))
    got = await chat.all(session_id)
    times = [message.create_time.ToMicroseconds() for message in got]
    assert times == sorted(times)
    assert times[0] > 1_700_000_000_000_000


async def test_create_time_never_decreases_when_the_clock_does(
    chat: Chat, database_url: str
) -> None:
    session_id = await chat.start(new_messages(2))
    # As if the clock had been an hour fast at an earlier append.
    await fetch(
        database_url, "UPDATE chat_sessions SET updated_at = '2100-01-01' WHERE id = $1", session_id
    )
    await fetch(
        database_url,
        "UPDATE chat_messages SET created_at = '2100-01-01' WHERE session_id = $1",
        session_id,
    )
    await chat.append(session_id, new_messages(2))
    await chat.update_session(id=session_id, title="x")
    await chat.append(session_id, new_messages(1))
    times = [message.create_time.ToMicroseconds() for message in await chat.all(session_id)]
    assert times == sorted(times)


# --- Reading a message.


async def test_missing_message_is_not_found(chat: Chat, other: Chat) -> None:
    session_id, elsewhere = await chat.start(), await chat.start(sent := new_messages(1))
    theirs = await other.start(foreign := new_messages(1))
    for missing in (new_id(), sent[0].id, foreign[0].id):
        for call in (
            chat.get(session_id, missing),
            chat.update(session_id, missing, content="x"),
            chat.delete(session_id, missing),
        ):
            await assert_fails(call, "MESSAGE_NOT_FOUND", session_id=session_id, message_id=missing)
    assert len(await chat.all(elsewhere)) == len(await other.all(theirs)) == 1


# --- Updating.


async def test_empty_mask_writes_every_field_that_is_set(chat: Chat) -> None:
    sent = new_message(
        "before", metadata={"k": 1}, token_count=5, parts=[{"text": "p"}], author="Ada"
    )
    session_id = await chat.start([sent])
    changed = await chat.update(
        session_id, sent.id, content="after", feedback={"score": 1, "comment": "good"}
    )
    assert (changed.content, changed.feedback.score, changed.feedback.comment) == (
        "after",
        1,
        "good",
    )
    assert (changed.token_count, changed.metadata["k"], changed.author, len(changed.parts)) == (
        5,
        1,
        "Ada",
        1,
    )
    assert (changed.seq, changed.role) == (1, USER)
    assert await chat.get(session_id, sent.id) == changed


async def test_mask_writes_only_its_fields_and_clears_empty_ones(chat: Chat) -> None:
    sent = new_message(
        "c", metadata={"k": 1}, token_count=5, parts=[{"text": "p"}], feedback={"score": 1}
    )
    session_id = await chat.start([sent])
    mask = ("parts", "metadata", "token_count", "feedback")
    changed = await chat.update(session_id, sent.id, mask, content="ignored")
    assert changed.content == "c"
    assert not changed.parts
    assert not any(changed.HasField(name) for name in ("metadata", "token_count", "feedback"))
    assert (await chat.update(session_id, sent.id, ("content",))).content == ""


async def test_feedback_with_score_zero_is_stored(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("c")])
    changed = await chat.update(session_id, sent.id, ("feedback",), feedback={})
    assert changed.HasField("feedback")
    assert (changed.feedback.score, changed.feedback.comment) == (0, "")


@pytest.mark.parametrize(
    "path",
    ["id", "session_id", "seq", "role", "author", "create_time", "etag", "feedback.score", "nope"],
)
async def test_mask_with_an_unwritable_field_is_rejected(chat: Chat, path: str) -> None:
    session_id = await chat.start([sent := new_message("c")])
    before = await chat.get(session_id, sent.id)
    await assert_field_violations(
        chat.update(session_id, sent.id, ("content", path), content="x"), "update_mask"
    )
    assert await chat.get(session_id, sent.id) == before


async def test_update_requires_session_and_message_id(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("c")])

    def request(**fields: Any) -> message_pb2.UpdateMessageRequest:
        return message_pb2.UpdateMessageRequest(**fields)

    inside = request(
        user_id=chat.user_id,
        message={"id": sent.id, "session_id": session_id.upper(), "content": "in it"},
    )
    assert (await chat.stub.UpdateMessage(inside)).message.content == "in it"
    await assert_field_violations(
        chat.stub.UpdateMessage(request(user_id=chat.user_id, message={"content": "x"})),
        "session_id",
        "message.id",
    )
    await assert_field_violations(chat.update(session_id, "", content="x"), "message.id")
    elsewhere = request(
        user_id=chat.user_id, session_id=session_id, message={"id": sent.id, "session_id": new_id()}
    )
    await assert_field_violations(chat.stub.UpdateMessage(elsewhere), "message.session_id")
    await assert_field_violations(
        chat.stub.UpdateMessage(request(user_id=chat.user_id, session_id=session_id)), "message"
    )


async def test_update_with_stale_etag_is_aborted(
    chat: Chat,
) -> None:
    session_id = await chat.start([sent := new_message("first")])
    first = await chat.get(session_id, sent.id)
    second = await chat.update(session_id, sent.id, content="second", etag=first.etag)
    assert second.etag != first.etag
    assert second.update_time.ToMicroseconds() >= first.update_time.ToMicroseconds()
    assert second.create_time == first.create_time
    failure = await assert_fails(
        chat.update(session_id, sent.id, content="third", etag=first.etag), "ETAG_MISMATCH"
    )
    assert failure.metadata["etag"] == second.etag
    assert await chat.get(session_id, sent.id) == second


async def test_one_of_concurrent_updates_with_one_etag_succeeds(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("c")])
    etag = (await chat.get(session_id, sent.id)).etag
    results = await asyncio.gather(
        *(chat.update(session_id, sent.id, content=f"{n}", etag=etag) for n in range(8)),
        return_exceptions=True,
    )
    won = [result for result in results if isinstance(result, message_pb2.Message)]
    assert len(won) == 1
    assert await chat.get(session_id, sent.id) == won[0]


async def test_update_of_content_updates_the_token_estimate(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("short")])
    for content, parts in (
        ("much longer " * 50, []),
        ("much longer " * 50, [{"text": "and more " * 50}]),
        ("", []),
    ):
        await chat.update(session_id, sent.id, ("content", "parts"), content=content, parts=parts)
        stored = (await chat.get(session_id, sent.id)).parts
        as_json = (
            json.dumps([{"text": part.text} for part in stored], separators=(",", ":"))
            if stored
            else None
        )
        assert (await chat.context(session_id)).token_count == estimate_tokens(content, as_json)


async def test_update_of_a_message_leaves_session_and_replay_unchanged(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("first"), new_message("second")])
    before = await chat.get_session(session_id)
    await chat.update(session_id, sent.id, content="edited", metadata={"k": 1})
    assert await chat.get_session(session_id) == before
    reply = await chat.append(session_id, [sent])
    assert [(message.seq, message.replayed) for message in reply.messages] == [(1, True)]
    assert (await chat.get(session_id, sent.id)).content == "edited"


# --- Deleting.


async def test_deleted_message_is_in_no_read_and_seqs_stay(
    chat: Chat,
) -> None:
    sent = new_messages(5)
    session_id = await chat.start(sent)
    await chat.delete(session_id, sent[1].id)
    await chat.delete(session_id, sent[4].id.upper())
    left = [1, 3, 4]
    assert [message.seq for message in await chat.all(session_id)] == left
    assert [
        message.seq
        for message in await chat.all(session_id, order="MESSAGE_ORDER_DESC", page_size=2)
    ] == left[::-1]
    assert [message.seq for message in (await chat.context(session_id)).messages] == left
    await assert_fails(chat.get(session_id, sent[1].id), "MESSAGE_NOT_FOUND")
    await assert_fails(chat.update(session_id, sent[1].id, content="back"), "MESSAGE_NOT_FOUND")
    session = await chat.get_session(session_id)
    assert (session.last_seq, session.message_count) == (5, 3)
    watch = chat.watch(session_id)
    assert [(await watch.read()).message.seq for _ in left] == left
    watch.cancel()
    assert (await chat.append(session_id, "next")).messages[0].seq == 6


async def test_deleted_message_leaves_no_content_in_the_database(
    chat: Chat, database_url: str
) -> None:
    sent = new_message(
        "content",
        ASSISTANT,
        parts=[{"text": "p"}],
        metadata={"k": 1},
        author="Ada",
        token_count=3,
        feedback={"score": 1, "comment": "c"},
    )
    session_id = await chat.start([sent])
    await chat.delete(session_id, sent.id)
    (row,) = await fetch(
        database_url, "SELECT * FROM chat_messages WHERE session_id = $1", session_id
    )
    assert (row["content"], row["author"], row["parts"], row["metadata"]) == ("", "", None, None)
    assert (row["feedback_score"], row["feedback_comment"], row["token_count"]) == (
        None,
        None,
        None,
    )
    assert (str(row["id"]), row["seq"], len(row["fingerprint"])) == (sent.id, 1, 16)


async def test_late_retry_does_not_restore_a_deleted_message(chat: Chat) -> None:
    sent = new_messages(3)
    session_id = await chat.start(sent)
    first = (await chat.append(session_id, sent)).messages
    await chat.delete(session_id, sent[1].id)
    again = (await chat.append(session_id, sent)).messages
    assert again == first
    assert all(message.replayed for message in again)
    assert [message.seq for message in await chat.all(session_id)] == [1, 3]
    assert (await chat.get_session(session_id)).message_count == 2


async def test_id_of_a_deleted_message_stays_taken(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("first"), new_message("second")])
    await chat.delete(session_id, sent.id)
    await assert_fails(
        chat.append(session_id, [new_message("other", id=sent.id)]),
        "MESSAGE_ID_REUSED",
        session_id=session_id,
        message_id=sent.id,
    )


async def test_deletion_of_a_missing_message_needs_allow_missing(chat: Chat) -> None:
    session_id = await chat.start([sent := new_message("c")])
    await chat.delete(session_id, sent.id)
    await assert_fails(
        chat.delete(session_id, sent.id),
        "MESSAGE_NOT_FOUND",
        session_id=session_id,
        message_id=sent.id,
    )
    await assert_fails(chat.delete(new_id(), sent.id), "SESSION_NOT_FOUND")
    for missing in (
        chat.delete(session_id, sent.id, allow_missing=True),
        chat.delete(new_id(), sent.id, allow_missing=True),
    ):
        await missing
    assert (await chat.get_session(session_id)).message_count == 0


async def test_concurrent_deletions_of_one_message_count_once(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(3))
    await asyncio.gather(
        *(chat.delete(session_id, sent[0].id, allow_missing=True) for _ in range(20))
    )
    assert (await chat.get_session(session_id)).message_count == 2


async def test_session_accepts_appends_after_all_messages_are_deleted(chat: Chat) -> None:
    session_id = await chat.start(sent := new_messages(3))
    for message in sent:
        await chat.delete(session_id, message.id)
    assert await chat.all(session_id) == []
    context = await chat.context(session_id)
    assert (list(context.messages), context.omitted_count, context.token_count) == ([], 0, 0)
    assert (await chat.append(session_id, "next", expected_last_seq=3)).messages[0].seq == 4


def test_token_estimate_grows_with_the_length() -> None:
    assert estimate_tokens("", None) == 0
    assert estimate_tokens("a", None) == 1
    assert estimate_tokens("é" * 100, None) > estimate_tokens("e" * 100, None)
    assert estimate_tokens("a" * 4000, '[{"text":"b"}]') > estimate_tokens("a" * 4000, None)
    assert math.isclose(estimate_tokens("a" * 4000, None), 1000)
