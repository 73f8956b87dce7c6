"""GetContext through the service and the database, compared with a model of the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from chathistory.v1 import message_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import context
from service.store.token_estimate import estimate_tokens
from tests.support import prompts
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
from tests.support.failures import assert_fails
from tests.support.prompts import ModelLimits, ModelMessage, expected_seqs, model_sessions

T = TypeVar("T")


def to_message(message: ModelMessage) -> message_pb2.Message:
    parts: list[dict[str, Any]] = [{"tool_call": {"id": id_}} for id_ in sorted(message.calls)]
    parts += [{"tool_result": {"tool_call_id": id_}} for id_ in sorted(message.results)]
    return new_message(
        f"message {message.seq}",
        message_pb2.Role.ValueType(message.role),
        token_count=message.tokens,
        parts=parts,
    )


async def store_session(chat: Chat, session: list[ModelMessage]) -> str:
    """Store a session of the model and return its id."""
    session_id = (await chat.create_session()).id
    sent = [to_message(message) for message in session]
    if sent:
        await chat.append(session_id, sent)
    for message, stored in zip(session, sent, strict=True):
        if message.is_deleted:
            await chat.delete(session_id, stored.id)
    return session_id


def seqs(reply: message_pb2.GetContextResponse) -> list[int]:
    return [message.seq for message in reply.messages]


async def test_the_context_of_any_session_agrees_with_the_model(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small reads, so that many selections need several.
    monkeypatch.setattr(context, "MIN_OLDER_READ", 1)
    loop = asyncio.get_running_loop()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    @given(
        model_sessions(),
        st.integers(0, 12),
        st.booleans(),
        st.lists(
            st.tuples(st.integers(1, 8), st.one_of(st.just(0), st.integers(1, 20))),
            min_size=1,
            max_size=4,
        ),
    )
    @settings(max_examples=120)
    def check(
        session: list[ModelMessage],
        summarized_through_seq: int,
        has_summary: bool,
        limits: list[tuple[int, int]],
    ) -> None:
        session_id = run(store_session(chat, session))
        summary = "what was said" if has_summary else ""
        summarized_through_seq = min(summarized_through_seq, len(session))
        run(
            chat.update_session(
                ("summary", "summarized_through_seq"),
                id=session_id,
                summary=summary,
                summarized_through_seq=summarized_through_seq,
            )
        )
        readable = {message.seq: message for message in session if not message.is_deleted}
        # Without a summary, no message is left out.
        covered_seq = summarized_through_seq if has_summary else 0
        for max_messages, max_tokens in limits:
            reply = run(chat.context(session_id, max_messages=max_messages, max_tokens=max_tokens))
            expected = expected_seqs(session, covered_seq, ModelLimits(max_messages, max_tokens))
            assert seqs(reply) == expected
            assert reply.omitted_count == len(readable) - len(expected)
            assert reply.token_count == sum(readable[seq].tokens for seq in expected)
            assert reply.session.summary == summary

    await asyncio.to_thread(check)


async def test_without_a_limit_fifty_messages_are_returned(chat: Chat) -> None:
    session_id = await chat.start(new_messages(100))
    await chat.append(session_id, new_messages(20))
    for limit, count in ((0, 50), (1, 1), (119, 119), (120, 120), (121, 120), (1000, 120)):
        reply = await chat.context(session_id, max_messages=limit)
        assert seqs(reply) == list(range(121 - count, 121))
        assert reply.omitted_count == 120 - count
    assert (await chat.context(session_id)).session == await chat.get_session(session_id)


async def test_tokens_are_counted_by_the_client_or_estimated(chat: Chat) -> None:
    contents = ["one " * 10, "two " * 20, "three " * 30]
    counted = new_message(contents[1], token_count=7)
    session_id = await chat.start([new_message(contents[0]), counted, new_message(contents[2])])
    estimates = [estimate_tokens(content, None) for content in contents]
    total = estimates[0] + 7 + estimates[2]
    reply = await chat.context(session_id)
    assert (reply.token_count, seqs(reply)) == (total, [1, 2, 3])
    for max_tokens, right in (
        (total, [1, 2, 3]),
        (total - 1, [2, 3]),
        (estimates[2], [3]),
        (1, [3]),
    ):
        reply = await chat.context(session_id, max_tokens=max_tokens)
        assert seqs(reply) == right
    await chat.update(session_id, counted.id, ("token_count",))
    assert (await chat.context(session_id)).token_count == sum(estimates)


async def test_messages_that_the_summary_covers_are_left_out(chat: Chat) -> None:
    session_id = await chat.start([new_message("be kind", SYSTEM), *new_messages(6)])
    await chat.update_session(id=session_id, summary="so far", summarized_through_seq=4)
    reply = await chat.context(session_id)
    assert (seqs(reply), reply.omitted_count) == ([1, 5, 6, 7], 3)
    await chat.update_session(("summary",), id=session_id)
    assert seqs(await chat.context(session_id)) == [1, 2, 3, 4, 5, 6, 7]
    await chat.update_session(id=session_id, summary="all of it", summarized_through_seq=7)
    assert seqs(await chat.context(session_id)) == [1]


async def test_a_summary_that_ends_between_a_call_and_its_result_leaves_out_both(
    chat: Chat,
) -> None:
    session_id = await chat.start(
        [
            new_message("question"),
            new_message("", ASSISTANT, parts=[{"tool_call": {"id": "c"}}]),
            new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": "c"}}]),
            new_message("answer", ASSISTANT),
        ]
    )
    await chat.update_session(id=session_id, summary="so far", summarized_through_seq=2)
    assert seqs(await chat.context(session_id)) == [4]


async def test_leading_system_messages_are_kept_in_a_long_session(chat: Chat) -> None:
    session_id = await chat.start(
        [
            new_message("one", SYSTEM),
            new_message("two", SYSTEM),
            new_message("hello"),
            new_message("three", SYSTEM),
        ]
    )
    for _ in range(3):
        await chat.append(session_id, new_messages(100))
    assert seqs(await chat.context(session_id, max_messages=3)) == [1, 2, 304]
    assert seqs(await chat.context(session_id, max_messages=1)) == [1, 2, 304]
    assert seqs(await chat.context(session_id, max_messages=5)) == [1, 2, 302, 303, 304]


async def test_a_system_message_is_leading_when_the_messages_before_it_are_deleted(
    chat: Chat,
) -> None:
    session_id = await chat.start(
        [first := new_message("hello"), new_message("be kind", SYSTEM), *new_messages(3)]
    )
    assert seqs(await chat.context(session_id, max_messages=1)) == [5]
    await chat.delete(session_id, first.id)
    assert seqs(await chat.context(session_id, max_messages=1)) == [2, 5]


async def test_a_session_of_system_messages_only_is_returned_whole(chat: Chat) -> None:
    session_id = await chat.start([new_message(str(n), SYSTEM) for n in range(5)])
    reply = await chat.context(session_id, max_messages=2)
    assert (seqs(reply), reply.omitted_count) == ([1, 2, 3, 4, 5], 0)


async def test_many_results_are_returned_with_their_distant_call(chat: Chat) -> None:
    calls = [{"tool_call": {"id": f"c{n}"}} for n in range(60)]
    session_id = await chat.start(
        [new_message("question"), new_message("", ASSISTANT, parts=calls)]
    )
    await chat.append(
        session_id,
        [
            new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": f"c{n}"}}])
            for n in range(60)
        ],
    )
    assert seqs(await chat.context(session_id, max_messages=3)) == list(range(2, 63))
    await chat.append(session_id, [new_message("answer", ASSISTANT)])
    assert seqs(await chat.context(session_id, max_messages=3)) == [63]
    assert seqs(await chat.context(session_id, max_messages=62)) == list(range(2, 64))


async def test_any_number_of_results_without_a_call_is_skipped(chat: Chat) -> None:
    session_id = await chat.start(new_messages(3))
    unpaired = [
        new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": f"c{n}"}}])
        for n in range(100)
    ]
    await chat.append(session_id, unpaired)
    reply = await chat.context(session_id, max_messages=2)
    assert (seqs(reply), reply.omitted_count) == ([2, 3], 101)


async def test_a_call_beyond_the_look_back_counts_as_missing(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "LOOK_BACK_MESSAGES", 20)
    session_id = await chat.start(
        [new_message("", ASSISTANT, parts=[{"tool_call": {"id": "c"}}]), *new_messages(40)]
    )
    await chat.append(
        session_id, [new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": "c"}}])]
    )
    assert seqs(await chat.context(session_id, max_messages=3)) == [39, 40, 41]


async def test_a_context_of_large_messages_is_cut_by_bytes(chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(30):
        await chat.append(session_id, [new_message("x" * 200_000)])
    reply = await chat.context(session_id)
    assert reply.ByteSize() <= MAX_REPLY_BYTES
    assert seqs(reply) == list(range(31 - len(reply.messages), 31))
    assert len(reply.messages) == 15


MAX_REPLY_BYTES = 3 * 1024 * 1024
"""Limit of a reply. The channel of these tests rejects more than 4 MiB, as every client does."""


async def test_large_leading_system_messages_are_cut_and_the_newest_message_is_kept(
    chat: Chat,
) -> None:
    session_id = (await chat.create_session()).id
    for n in range(30):
        await chat.append(session_id, [new_message(f"{n}" + "x" * 200_000, SYSTEM)])
    await chat.append(session_id, new_messages(3))
    reply = await chat.context(session_id)
    assert seqs(reply) == [*range(1, 16), 33]
    assert reply.ByteSize() <= MAX_REPLY_BYTES
    assert reply.omitted_count == 17
    assert seqs(await chat.context(session_id, max_messages=1, max_tokens=1)) == [*range(1, 16), 33]


async def test_the_beginning_of_a_newest_group_that_is_too_large_is_returned(chat: Chat) -> None:
    calls = [{"tool_call": {"id": f"c{n}"}} for n in range(40)]
    session_id = await chat.start(
        [
            new_message("be kind", SYSTEM),
            new_message("question"),
            new_message("", ASSISTANT, parts=calls),
        ]
    )
    for n in range(40):
        result = {"tool_result": {"tool_call_id": f"c{n}", "content": "x" * 200_000}}
        await chat.append(session_id, [new_message("", TOOL, parts=[result])])
    reply = await chat.context(session_id)
    assert seqs(reply) == [1, *range(3, 19)], (
        "the call, the results that fit, and the system message that fits with them"
    )
    assert reply.ByteSize() <= MAX_REPLY_BYTES
    await chat.append(session_id, [new_message("answer", ASSISTANT)])
    assert seqs(await chat.context(session_id)) == [1, 44]


async def test_a_call_beyond_the_look_back_of_bytes_counts_as_missing(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The messages that are read are held in memory, so that their bytes are limited."""
    monkeypatch.setattr(context, "LOOK_BACK_BYTES", 4 * 1024 * 1024)
    session_id = await chat.start(
        [new_message("question"), new_message("", ASSISTANT, parts=[{"tool_call": {"id": "c"}}])]
    )
    for _ in range(50):
        result = {"tool_result": {"tool_call_id": "c", "content": "x" * 200_000}}
        await chat.append(session_id, [new_message("", TOOL, parts=[result])])
    assert seqs(await chat.context(session_id)) == []


async def test_a_context_holds_messages_of_one_user_and_one_session(
    chat: Chat, other: Chat
) -> None:
    session_id = await chat.start(new_messages(3, "mine"))
    await chat.start(new_messages(3, "elsewhere"))
    theirs = (await other.create_session(id=session_id)).id
    await other.append(theirs, new_messages(5, "theirs"))
    for user, prefix, count in ((chat, "mine", 3), (other, "theirs", 5)):
        reply = await user.context(session_id)
        assert [message.content for message in reply.messages] == [
            f"{prefix} {n}" for n in range(1, count + 1)
        ]
        assert reply.session.user_id == user.user_id
    await assert_fails(chat.context(missing := new_id()), "SESSION_NOT_FOUND", session_id=missing)


async def test_concurrent_requests_get_their_own_contexts(chat: Chat, other: Chat) -> None:
    sessions = [
        (user, await user.start(new_messages(n, f"{n}")))
        for n in range(1, 16)
        for user in (chat, other)
    ]
    replies = await asyncio.gather(
        *(user.context(session_id, max_messages=5) for user, session_id in sessions)
    )
    for (user, session_id), reply in zip(sessions, replies, strict=True):
        assert (reply.session.id, reply.session.user_id) == (session_id, user.user_id)
        count = reply.session.last_seq
        assert [message.content for message in reply.messages] == [
            f"{count} {n}" for n in range(max(1, count - 4), count + 1)
        ]


def test_the_roles_of_the_model_are_those_of_the_service() -> None:
    assert (prompts.USER, prompts.ASSISTANT, prompts.SYSTEM, prompts.TOOL) == (
        USER,
        ASSISTANT,
        SYSTEM,
        TOOL,
    )
