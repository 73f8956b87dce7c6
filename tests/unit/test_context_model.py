"""The choice of a prompt's messages, against a model that was written from the contract's words alone."""

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
    Said,
    Wanted,
    expected,
    histories,
    wants,
)


def row(said: Said) -> MessageRow:
    parts = [{"tool_call": {"id": each}} for each in sorted(said.calls)]
    parts += [{"tool_result": {"tool_call_id": each}} for each in sorted(said.results)]
    as_json = json.dumps(parts) if parts else None
    return MessageRow(
        str(said.seq), said.seq, said.role, "", as_json, None, said.tokens, 0, said.size, "", None, None, 0, 0, 1
    )  # fmt: skip


def given_to_choose(
    history: Sequence[Said], through: int
) -> tuple[list[MessageRow], list[MessageRow]]:
    """Return the leading SYSTEM messages, and those that a summary does not cover, newest first."""
    there = [each for each in history if not each.deleted]
    leading = list(takewhile(lambda each: each.role == SYSTEM, there))
    return [row(each) for each in leading], [
        row(each) for each in reversed(there) if each.seq > through
    ]


def limits(wanted: Wanted) -> Limits:
    return Limits(wanted.max_messages, wanted.max_tokens, wanted.max_bytes)


def conversation(*said: tuple[int, str, str]) -> list[Said]:
    """Make a session of (role, calls, results)."""
    return [
        Said(seq, role, frozenset(calls), frozenset(results))
        for seq, (role, calls, results) in enumerate(said, 1)
    ]


ANY = Wanted(1000)
U, S = (USER, "", ""), (SYSTEM, "", "")


@given(histories(), st.integers(0, 12), wants())
@settings(max_examples=1000)
# Two calls with one id, whose results come in one message: only the newer one is answered.
@example(conversation((ASSISTANT, "ab", ""), (ASSISTANT, "a", ""), (TOOL, "", "ab"), U), 0, ANY)
@example(conversation((ASSISTANT, "ab", ""), (ASSISTANT, "a", ""), (TOOL, "", "ab")), 0, ANY)
# The newest call with the id stands in a message that is never sent.
@example(conversation((ASSISTANT, "a", ""), (ASSISTANT, "a", "x"), (TOOL, "", "a")), 0, ANY)
# What comes after an open call belongs to its group, but is no result of it.
@example(conversation((ASSISTANT, "ac", ""), (ASSISTANT, "b", ""), (TOOL, "", "ab")), 0, ANY)
# Of a newest group that is too large, what fits would leave an open call with another message after it.
@example(
    conversation((ASSISTANT, "a", ""), (ASSISTANT, "b", ""), (TOOL, "", "ab")),
    0,
    Wanted(1000, max_bytes=2),
)
def test_the_choice_is_the_models(history: list[Said], through: int, wanted: Wanted) -> None:
    system, newest = given_to_choose(history, through)
    chosen = select_messages(system, newest, limits(wanted), is_complete=True)
    assert chosen is not None
    assert [each.seq for each in chosen] == expected(history, through, wanted)


@given(histories(), st.integers(0, 12), wants())
@settings(max_examples=400)
def test_a_choice_from_the_newest_messages_alone_is_right_or_put_off(
    history: list[Said], through: int, wanted: Wanted
) -> None:
    system, newest = given_to_choose(history, through)
    right = expected(history, through, wanted)
    for count in range(len(newest) + 1):
        chosen = select_messages(system, newest[:count], limits(wanted), is_complete=False)
        assert chosen is None or [each.seq for each in chosen] == right, f"from the newest {count}"


@given(histories(), st.integers(0, 12), wants())
@settings(max_examples=400)
def test_what_is_chosen_is_what_model_apis_take(
    history: list[Said], through: int, wanted: Wanted
) -> None:
    """What the contract promises of every prompt, looked for in the prompt itself and not in how it was made."""
    by_seq = {each.seq: each for each in history}
    system, newest = given_to_choose(history, through)
    chosen = select_messages(system, newest, limits(wanted), is_complete=True)
    assert chosen is not None
    prompt = [by_seq[each.seq] for each in chosen]
    assert [each.seq for each in prompt] == sorted({each.seq for each in prompt})
    leading = [each.seq for each in system]
    kept = [each.seq for each in prompt if each.seq in leading]
    assert kept == leading[: len(kept)]
    assert len(kept) == len(leading) or sum(each.size for each in history) > wanted.max_bytes
    assert sum(each.size for each in prompt) <= wanted.max_bytes
    assert not any(each.deleted for each in prompt)
    assert all(each.seq > through for each in prompt[len(kept) :])
    for place, message in enumerate(prompt):
        before, after = prompt[:place], prompt[place + 1 :]
        assert all(any(each in other.asks for other in before) for each in message.answers), (
            "a result without its call"
        )
        missing = message.asks - {each for other in after for each in other.answers}
        assert not missing or all(other.answers for other in after), (
            "a call without its result, and not at the end"
        )


def test_plain_messages_are_taken_from_the_newest_on() -> None:
    history = conversation(S, U, U, U, U)
    for count, seqs in (
        (1, [1, 5]),
        (2, [1, 5]),
        (3, [1, 4, 5]),
        (4, [1, 3, 4, 5]),
        (5, [1, 2, 3, 4, 5]),
    ):
        assert expected(history, 0, Wanted(count)) == seqs
        system, newest = given_to_choose(history, 0)
        chosen = select_messages(system, newest, Limits(count), is_complete=True)
        assert chosen is not None
        assert [each.seq for each in chosen] == seqs


def test_a_call_and_its_results_stay_together_even_above_the_limits() -> None:
    history = conversation(U, (ASSISTANT, "ab", ""), (TOOL, "", "b"), (TOOL, "", "a"))
    system, newest = given_to_choose(history, 0)
    chosen = select_messages(system, newest, Limits(1, 1), is_complete=True)
    assert chosen is not None
    assert [each.seq for each in chosen] == [2, 3, 4]


def test_many_messages_are_chosen_from_in_a_time_that_grows_with_their_number() -> None:
    """A thousand calls with results each: what takes the square of the number would take minutes."""
    said = [((ASSISTANT, "", ""), (TOOL, "", ""))[n % 2] for n in range(4000)]
    history = [
        Said(
            seq,
            role,
            frozenset({f"c{seq}"} if role == ASSISTANT else ()),
            frozenset({f"c{seq - 1}"} if role == TOOL else ()),
        )
        for seq, (role, _, _) in enumerate(said, 1)
    ]
    system, newest = given_to_choose(history, 0)
    chosen = select_messages(system, newest, Limits(1000), is_complete=True)
    assert chosen is not None
    assert [each.seq for each in chosen] == list(range(3001, 4001))
