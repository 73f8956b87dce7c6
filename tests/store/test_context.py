"""GetContext through the service and the database: as the model says, whatever is in the session, deleted, summarized or asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from chathistory.v1 import message_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import context
from service.store.messages import estimate_tokens
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
from tests.support.prompts import Said, Wanted, expected, histories

T = TypeVar("T")


def message(said: Said) -> message_pb2.Message:
    parts: list[dict[str, Any]] = [{"tool_call": {"id": each}} for each in sorted(said.calls)]
    parts += [{"tool_result": {"tool_call_id": each}} for each in sorted(said.results)]
    return new_message(
        f"message {said.seq}",
        message_pb2.Role.ValueType(said.role),
        token_count=said.tokens,
        parts=parts,
    )


async def write(chat: Chat, history: list[Said]) -> str:
    """Store a session as the model sees it, and return its id."""
    session_id = (await chat.create_session()).id
    sent = [message(said) for said in history]
    if sent:
        await chat.append(session_id, sent)
    for said, stored in zip(history, sent, strict=True):
        if said.deleted:
            await chat.delete(session_id, stored.id)
    return session_id


def seqs(reply: message_pb2.GetContextResponse) -> list[int]:
    return [each.seq for each in reply.messages]


async def test_any_session_gives_the_models_prompt(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small reads, so that what is chosen is often found in several.
    monkeypatch.setattr(context, "MIN_OLDER_READ", 1)
    loop = asyncio.get_running_loop()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    @given(
        histories(),
        st.integers(0, 12),
        st.booleans(),
        st.lists(
            st.tuples(st.integers(1, 8), st.one_of(st.just(0), st.integers(1, 20))),
            min_size=1,
            max_size=4,
        ),
    )
    @settings(max_examples=120)
    def holds(
        history: list[Said], through: int, has_summary: bool, limits: list[tuple[int, int]]
    ) -> None:
        session_id = run(write(chat, history))
        through = min(through, len(history))
        run(
            chat.update_session(
                ("summary", "summarized_through_seq"),
                id=session_id,
                summary="what was said" if has_summary else "",
                summarized_through_seq=through,
            )
        )
        there = {each.seq: each for each in history if not each.deleted}
        for max_messages, max_tokens in limits:
            reply = run(chat.context(session_id, max_messages=max_messages, max_tokens=max_tokens))
            # Only a summary leaves messages out.
            right = expected(
                history, through if has_summary else 0, Wanted(max_messages, max_tokens)
            )
            assert seqs(reply) == right
            assert reply.omitted_count == len(there) - len(right)
            assert reply.token_count == sum(there[seq].tokens for seq in right)
            assert reply.session.summary == ("what was said" if has_summary else "")

    await asyncio.to_thread(holds)


async def test_fifty_messages_come_unless_asked_otherwise(chat: Chat) -> None:
    session_id = await chat.start(new_messages(100))
    await chat.append(session_id, new_messages(20))
    for asked, count in ((0, 50), (1, 1), (119, 119), (120, 120), (121, 120), (1000, 120)):
        reply = await chat.context(session_id, max_messages=asked)
        assert seqs(reply) == list(range(121 - count, 121))
        assert reply.omitted_count == 120 - count
    assert (await chat.context(session_id)).session == await chat.get_session(session_id)


async def test_tokens_are_the_clients_or_else_estimated(chat: Chat) -> None:
    said = ["one " * 10, "two " * 20, "three " * 30]
    counted = new_message(said[1], token_count=7)
    session_id = await chat.start([new_message(said[0]), counted, new_message(said[2])])
    estimates = [estimate_tokens(each, None) for each in said]
    total = estimates[0] + 7 + estimates[2]
    reply = await chat.context(session_id)
    assert (reply.token_count, seqs(reply)) == (total, [1, 2, 3])
    for max_tokens, expected_seqs in (
        (total, [1, 2, 3]),
        (total - 1, [2, 3]),
        (estimates[2], [3]),
        (1, [3]),
    ):
        reply = await chat.context(session_id, max_tokens=max_tokens)
        assert seqs(reply) == expected_seqs
    await chat.update(session_id, counted.id, ("token_count",))
    assert (await chat.context(session_id)).token_count == sum(estimates)


async def test_a_summary_stands_for_what_it_covers(chat: Chat) -> None:
    session_id = await chat.start([new_message("be kind", SYSTEM), *new_messages(6)])
    await chat.update_session(id=session_id, summary="so far", summarized_through_seq=4)
    reply = await chat.context(session_id)
    assert (seqs(reply), reply.omitted_count) == ([1, 5, 6, 7], 3)
    await chat.update_session(("summary",), id=session_id)
    assert seqs(await chat.context(session_id)) == [1, 2, 3, 4, 5, 6, 7]
    await chat.update_session(id=session_id, summary="all of it", summarized_through_seq=7)
    assert seqs(await chat.context(session_id)) == [1]


async def test_a_summary_that_ends_between_a_call_and_its_result_takes_both(chat: Chat) -> None:
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


async def test_leading_system_messages_stay_however_long_ago_they_were(chat: Chat) -> None:
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


async def test_a_system_message_is_leading_when_what_came_before_it_is_deleted(chat: Chat) -> None:
    session_id = await chat.start(
        [first := new_message("hello"), new_message("be kind", SYSTEM), *new_messages(3)]
    )
    assert seqs(await chat.context(session_id, max_messages=1)) == [5]
    await chat.delete(session_id, first.id)
    assert seqs(await chat.context(session_id, max_messages=1)) == [2, 5]


async def test_a_session_of_system_messages_alone_is_its_own_prompt(chat: Chat) -> None:
    session_id = await chat.start([new_message(str(n), SYSTEM) for n in range(5)])
    reply = await chat.context(session_id, max_messages=2)
    assert (seqs(reply), reply.omitted_count) == ([1, 2, 3, 4, 5], 0)


async def test_many_results_of_one_call_come_however_far_back_it_is(chat: Chat) -> None:
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


async def test_results_whose_call_is_nowhere_are_passed_over_to_the_end(chat: Chat) -> None:
    session_id = await chat.start(new_messages(3))
    stray = [
        new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": f"c{n}"}}])
        for n in range(100)
    ]
    await chat.append(session_id, stray)
    reply = await chat.context(session_id, max_messages=2)
    assert (seqs(reply), reply.omitted_count) == ([2, 3], 101)


async def test_the_call_of_a_far_result_is_looked_for_within_a_bound(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the session, only so much of it is read: beyond that a call counts as not there."""
    monkeypatch.setattr(context, "LOOK_BACK_MESSAGES", 20)
    session_id = await chat.start(
        [new_message("", ASSISTANT, parts=[{"tool_call": {"id": "c"}}]), *new_messages(40)]
    )
    await chat.append(
        session_id, [new_message("", TOOL, parts=[{"tool_result": {"tool_call_id": "c"}}])]
    )
    assert seqs(await chat.context(session_id, max_messages=3)) == [39, 40, 41]


async def test_a_heavy_session_is_cut_by_its_bytes(chat: Chat) -> None:
    session_id = (await chat.create_session()).id
    for _ in range(30):
        await chat.append(session_id, [new_message("x" * 200_000)])
    reply = await chat.context(session_id)
    assert reply.ByteSize() <= 3 * 1024 * 1024
    assert seqs(reply) == list(range(31 - len(reply.messages), 31))
    assert len(reply.messages) == 15


READABLE = 3 * 1024 * 1024
"""What a reply's messages take at the most; the channel of these tests refuses more than 4 MiB, as every client's does."""


async def test_megabytes_of_leading_system_messages_are_cut_and_the_newest_message_stays(
    chat: Chat,
) -> None:
    session_id = (await chat.create_session()).id
    for n in range(30):
        await chat.append(session_id, [new_message(f"{n}" + "x" * 200_000, SYSTEM)])
    await chat.append(session_id, new_messages(3))
    reply = await chat.context(session_id)
    assert seqs(reply) == [*range(1, 16), 33]
    assert reply.ByteSize() <= READABLE
    assert reply.omitted_count == 17
    assert seqs(await chat.context(session_id, max_messages=1, max_tokens=1)) == [*range(1, 16), 33]


async def test_of_a_newest_group_that_is_too_large_the_beginning_comes(chat: Chat) -> None:
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
        "the call, the results that fit, and the system message that fits beside them"
    )
    assert reply.ByteSize() <= READABLE
    await chat.append(session_id, [new_message("answer", ASSISTANT)])
    assert seqs(await chat.context(session_id)) == [1, 44]


async def test_the_call_of_heavy_results_is_looked_for_within_a_bound(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked at is held in memory: however many megabytes of results there are, only so many are read."""
    monkeypatch.setattr(context, "LOOK_BACK_BYTES", 4 * 1024 * 1024)
    session_id = await chat.start(
        [new_message("question"), new_message("", ASSISTANT, parts=[{"tool_call": {"id": "c"}}])]
    )
    for _ in range(50):
        result = {"tool_result": {"tool_call_id": "c", "content": "x" * 200_000}}
        await chat.append(session_id, [new_message("", TOOL, parts=[result])])
    assert seqs(await chat.context(session_id)) == []


async def test_a_prompt_is_of_one_user_and_one_session(chat: Chat, other: Chat) -> None:
    session_id = await chat.start(new_messages(3, "mine"))
    await chat.start(new_messages(3, "elsewhere"))
    theirs = (await other.create_session(id=session_id)).id
    await other.append(theirs, new_messages(5, "theirs"))
    for who, prefix, count in ((chat, "mine", 3), (other, "theirs", 5)):
        reply = await who.context(session_id)
        assert [each.content for each in reply.messages] == [
            f"{prefix} {n}" for n in range(1, count + 1)
        ]
        assert reply.session.user_id == who.user_id
    await assert_fails(chat.context(missing := new_id()), "SESSION_NOT_FOUND", session_id=missing)


async def test_prompts_asked_for_at_once_are_each_ones_own(chat: Chat, other: Chat) -> None:
    sessions = [
        (who, await who.start(new_messages(n, f"{n}")))
        for n in range(1, 16)
        for who in (chat, other)
    ]
    replies = await asyncio.gather(
        *(who.context(session_id, max_messages=5) for who, session_id in sessions)
    )
    for (who, session_id), reply in zip(sessions, replies, strict=True):
        assert (reply.session.id, reply.session.user_id) == (session_id, who.user_id)
        count = reply.session.last_seq
        assert [each.content for each in reply.messages] == [
            f"{count} {n}" for n in range(max(1, count - 4), count + 1)
        ]


def test_the_models_roles_are_the_services() -> None:
    assert (prompts.USER, prompts.ASSISTANT, prompts.SYSTEM, prompts.TOOL) == (
        USER,
        ASSISTANT,
        SYSTEM,
        TOOL,
    )
