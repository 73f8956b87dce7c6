"""The selection of a prompt's messages agrees with a model written from the contract alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.store.context import Limits, select_messages
from service.store.rows import MessageRow
from tests.support.prompts import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    ModelLimits,
    ModelMessage,
    expected_seqs,
    model_limits,
    model_sessions,
)


def row(message: ModelMessage) -> MessageRow:
    parts = [{"tool_call": {"id": id_}} for id_ in sorted(message.calls)]
    parts += [{"tool_result": {"tool_call_id": id_}} for id_ in sorted(message.results)]
    return MessageRow(
        id=str(message.seq),
        seq=message.seq,
        role=message.role,
        content="",
        parts=json.dumps(parts) if parts else None,
        metadata=None,
        token_count=message.tokens,
        token_estimate=0,
        size=message.size_bytes,
        author="",
        feedback_score=None,
        feedback_comment=None,
        created_us=0,
        updated_us=0,
        revision=1,
    )


def system_and_newest(
    session: Sequence[ModelMessage], summarized_through_seq: int = 0
) -> tuple[list[MessageRow], list[MessageRow]]:
    """Return the leading SYSTEM messages, and those that no summary covers, newest first."""
    readable = [message for message in session if not message.is_deleted]
    leading = takewhile(lambda message: message.role == SYSTEM, readable)
    newest = [message for message in reversed(readable) if message.seq > summarized_through_seq]
    return list(map(row, leading)), list(map(row, newest))


def to_limits(limits: ModelLimits) -> Limits:
    return Limits(limits.max_messages, limits.max_tokens, limits.max_bytes)


def selected_seqs(
    session: Sequence[ModelMessage], summarized_through_seq: int, limits: Limits
) -> list[int]:
    system, newest = system_and_newest(session, summarized_through_seq)
    selected = select_messages(system, newest, limits, is_complete=True)
    assert selected is not None
    return [message.seq for message in selected]


def conversation(*messages: tuple[int, str, str]) -> list[ModelMessage]:
    """Return a session of messages given as (role, ids of calls, ids of results)."""
    return [
        ModelMessage(seq, role, frozenset(calls), frozenset(results))
        for seq, (role, calls, results) in enumerate(messages, 1)
    ]


NO_LIMIT = ModelLimits(1000)
U, S = (USER, "", ""), (SYSTEM, "", "")


@given(model_sessions(), st.integers(0, 12), model_limits())
@settings(max_examples=1000)
# Two calls with one id, and their results in one message: only the newer call has a result.
@example(
    conversation((ASSISTANT, "ab", ""), (ASSISTANT, "a", ""), (TOOL, "", "ab"), U), 0, NO_LIMIT
)
@example(conversation((ASSISTANT, "ab", ""), (ASSISTANT, "a", ""), (TOOL, "", "ab")), 0, NO_LIMIT)
# The newest call with the id is in a message that is never sent.
@example(conversation((ASSISTANT, "a", ""), (ASSISTANT, "a", "x"), (TOOL, "", "a")), 0, NO_LIMIT)
# The message after an open call belongs to its group, but holds no result of it.
@example(conversation((ASSISTANT, "ac", ""), (ASSISTANT, "b", ""), (TOOL, "", "ab")), 0, NO_LIMIT)
# The part of a newest group that fits would leave an open call with another message after it.
@example(
    conversation((ASSISTANT, "a", ""), (ASSISTANT, "b", ""), (TOOL, "", "ab")),
    0,
    ModelLimits(1000, max_bytes=2),
)
def test_selection_agrees_with_the_model(
    session: list[ModelMessage], summarized_through_seq: int, limits: ModelLimits
) -> None:
    selected = selected_seqs(session, summarized_through_seq, to_limits(limits))
    assert selected == expected_seqs(session, summarized_through_seq, limits)


@given(model_sessions(), st.integers(0, 12), model_limits())
@settings(max_examples=400)
def test_selection_from_the_newest_messages_is_correct_or_undecided(
    session: list[ModelMessage], summarized_through_seq: int, limits: ModelLimits
) -> None:
    system, newest = system_and_newest(session, summarized_through_seq)
    expected = expected_seqs(session, summarized_through_seq, limits)
    for count in range(len(newest) + 1):
        selected = select_messages(system, newest[:count], to_limits(limits), is_complete=False)
        seqs = None if selected is None else [message.seq for message in selected]
        assert seqs in (None, expected), f"from the newest {count}"


@given(model_sessions(), st.integers(0, 12), model_limits())
@settings(max_examples=400)
def test_model_apis_accept_the_selected_messages(
    session: list[ModelMessage], summarized_through_seq: int, limits: ModelLimits
) -> None:
    """Checks the contract's promises in the prompt itself, without the model."""
    by_seq = {message.seq: message for message in session}
    leading = [message.seq for message in system_and_newest(session)[0]]
    seqs = selected_seqs(session, summarized_through_seq, to_limits(limits))
    prompt = [by_seq[seq] for seq in seqs]
    assert seqs == sorted(set(seqs))
    kept_leading = [seq for seq in seqs if seq in leading]
    assert kept_leading == leading[: len(kept_leading)]
    session_bytes = sum(message.size_bytes for message in session)
    assert len(kept_leading) == len(leading) or session_bytes > limits.max_bytes
    assert sum(message.size_bytes for message in prompt) <= limits.max_bytes
    assert not any(message.is_deleted for message in prompt)
    assert all(seq > summarized_through_seq for seq in seqs[len(kept_leading) :])
    for index, message in enumerate(prompt):
        before, after = prompt[:index], prompt[index + 1 :]
        assert all(
            any(result in other.open_calls for other in before)
            for result in message.foreign_results
        ), "a result without its call"
        missing = message.open_calls - {
            result for other in after for result in other.foreign_results
        }
        assert not missing or all(other.foreign_results for other in after), (
            "a call without its result, and not at the end"
        )


def test_plain_messages_are_selected_from_the_newest_on() -> None:
    session = conversation(S, U, U, U, U)
    for max_messages, seqs in (
        (1, [1, 5]),
        (2, [1, 5]),
        (3, [1, 4, 5]),
        (4, [1, 3, 4, 5]),
        (5, [1, 2, 3, 4, 5]),
    ):
        assert expected_seqs(session, 0, ModelLimits(max_messages)) == seqs
        assert selected_seqs(session, 0, Limits(max_messages)) == seqs


def test_a_call_and_its_results_stay_together_above_the_limits() -> None:
    session = conversation(U, (ASSISTANT, "ab", ""), (TOOL, "", "b"), (TOOL, "", "a"))
    assert selected_seqs(session, 0, Limits(max_messages=1, max_tokens=1)) == [2, 3, 4]


def test_selection_time_is_linear_in_the_number_of_messages() -> None:
    """With 2,000 calls and results, quadratic work would exceed the test's timeout."""
    session = []
    for seq in range(1, 4001, 2):
        call = frozenset({f"call {seq}"})
        session += [
            ModelMessage(seq, ASSISTANT, calls=call),
            ModelMessage(seq + 1, TOOL, results=call),
        ]
    assert selected_seqs(session, 0, Limits(1000)) == list(range(3001, 4001))
