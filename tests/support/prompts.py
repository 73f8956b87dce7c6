"""A plain model of GetContext, written from the contract alone: it considers every message.

The contract leaves some cases open. The docstring of service/store/context.py decides them:
- A result belongs to the newest earlier call with its id, so that an id may be used again. A second
  result of the same call goes with it too.
- A message with a result whose call is missing is never sent, whatever else it holds, including
  calls of its own.
- Only tool calls of assistant messages are calls. A message that holds both a call and its result
  needs no other message.
- Groups whose results are in one message are one group.
- A call that lacks a result may be sent when nothing but its own results follows it. Messages that
  are never sent, because their call is missing, do not count as following.
- The newest group is the one with the newest message. The first group that does not fit ends the
  selection.
- The limit of bytes always holds. Of a newest group that is too large, the longest beginning that
  may be sent is kept. Then follow the leading SYSTEM messages from the first on, and then older
  groups. Again, the first that does not fit ends the selection.
- Deleted messages do not exist. Leading SYSTEM messages are those before the first message of
  another role in the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from hypothesis import strategies as st

USER, ASSISTANT, SYSTEM, TOOL = 1, 2, 3, 4


@dataclass(frozen=True)
class ModelMessage:
    """A message of a session, for the model."""

    seq: int
    role: int
    calls: frozenset[str] = field(default=frozenset())
    results: frozenset[str] = field(default=frozenset())
    tokens: int = 1
    size_bytes: int = 1
    is_deleted: bool = False

    @property
    def open_calls(self) -> frozenset[str]:
        """Calls that need a result in another message."""
        return self.calls - self.results if self.role == ASSISTANT else frozenset()

    @property
    def foreign_results(self) -> frozenset[str]:
        """Results of calls in other messages."""
        return self.results - self.calls if self.role == ASSISTANT else self.results


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a prompt; `max_tokens` 0 means no limit."""

    max_messages: int
    max_tokens: int = 0
    max_bytes: int = 3 * 1024 * 1024

    def allow(self, messages: Sequence[ModelMessage]) -> bool:
        return (
            len(messages) <= self.max_messages
            and (self.max_tokens == 0 or sum(m.tokens for m in messages) <= self.max_tokens)
            and _size_bytes(messages) <= self.max_bytes
        )


def expected_seqs(
    session: Sequence[ModelMessage], summarized_through_seq: int, limits: ModelLimits
) -> list[int]:
    """Return the seqs of the messages in the prompt."""
    readable = [message for message in session if not message.is_deleted]
    leading = list(takewhile(lambda message: message.role == SYSTEM, readable))
    rest = [message for message in readable[len(leading) :] if message.seq > summarized_through_seq]
    callers = _callers(rest)
    rest = [message for message in rest if message.seq in callers]
    groups = _groups(rest, callers)
    newest = groups[0] if groups else []
    newest_kept = max(
        (
            beginning
            for beginning in _sendable_beginnings(newest)
            if _size_bytes(beginning) <= limits.max_bytes
        ),
        key=len,
        default=[],
    )
    system_kept = max(
        (
            beginning
            for beginning in _beginnings(leading)
            if _size_bytes([*newest_kept, *beginning]) <= limits.max_bytes
        ),
        key=len,
    )
    kept = [*newest_kept, *system_kept]
    if len(kept) == len(newest) + len(leading):
        for group in groups[1:]:
            if not limits.allow([*kept, *group]):
                break
            kept = [*kept, *group]
    return sorted(message.seq for message in kept)


def _size_bytes(messages: Sequence[ModelMessage]) -> int:
    return sum(message.size_bytes for message in messages)


def _beginnings(messages: Sequence[ModelMessage]) -> list[Sequence[ModelMessage]]:
    return [messages[:count] for count in range(len(messages) + 1)]


def _sendable_beginnings(group: Sequence[ModelMessage]) -> list[Sequence[ModelMessage]]:
    """Return the beginnings of a group that may be sent alone: their open calls are at the end."""
    return [
        beginning
        for beginning in _beginnings(group)
        if len(beginning) == len(group)
        or all(_may_be_sent(message, beginning, _callers(beginning)) for message in beginning)
    ]


def _callers(messages: Sequence[ModelMessage]) -> dict[int, dict[str, int]]:
    """Return the seqs of the calls of its results for each message, by seq, that may be sent."""
    callers: dict[int, dict[str, int]] = {}
    for message in messages:
        seqs = {
            result: max(
                (
                    other.seq
                    for other in messages
                    if other.seq < message.seq and result in other.open_calls
                ),
                default=0,
            )
            for result in message.foreign_results
        }
        # The messages of the calls must be ones that may be sent.
        if all(seq in callers for seq in seqs.values()):
            callers[message.seq] = seqs
    return callers


def _groups(
    messages: Sequence[ModelMessage], callers: dict[int, dict[str, int]]
) -> list[list[ModelMessage]]:
    """Return the groups that may be sent, newest first."""
    seq_groups = [{message.seq} for message in messages]
    for seq, seqs in callers.items():
        joined = [group for group in seq_groups if seq in group or group & set(seqs.values())]
        seq_groups = [group for group in seq_groups if group not in joined]
        seq_groups.append(set().union(*joined))
    by_seq = {message.seq: message for message in messages}
    groups = [
        [by_seq[seq] for seq in sorted(group)]
        for group in sorted(seq_groups, key=max, reverse=True)
    ]
    return [
        group
        for group in groups
        if all(_may_be_sent(message, messages, callers) for message in group)
    ]


def _may_be_sent(
    message: ModelMessage, messages: Sequence[ModelMessage], callers: dict[int, dict[str, int]]
) -> bool:
    answered = {
        result for seqs in callers.values() for result, seq in seqs.items() if seq == message.seq
    }
    if message.open_calls <= answered:
        return True
    later = [other for other in messages if other.seq > message.seq]
    return all(message.seq in callers[other.seq].values() for other in later)


# --- Sessions of any shape.

_ids = st.sets(st.sampled_from("abc"), max_size=2).map(frozenset)
_tokens = st.integers(0, 5)
_sizes = st.integers(1, 4)
_deleted = st.sampled_from([False] * 5 + [True])


@st.composite
def model_sessions(draw: st.DrawFn, max_size: int = 14) -> list[ModelMessage]:
    """Draw a session: a mix of arbitrary messages and of realistic exchanges with some flaws."""
    drafts = draw(st.lists(st.one_of(_any_message(), _exchange()), max_size=max_size))
    leading_count = draw(st.integers(0, 2))
    messages = [
        ModelMessage(0, SYSTEM, tokens=draw(_tokens), size_bytes=draw(_sizes))
        for _ in range(leading_count)
    ]
    messages += [message for draft in drafts for message in draft]
    return [
        ModelMessage(seq, m.role, m.calls, m.results, m.tokens, m.size_bytes, m.is_deleted)
        for seq, m in enumerate(messages, 1)
    ]


@st.composite
def _any_message(draw: st.DrawFn) -> list[ModelMessage]:
    role = draw(st.sampled_from([USER, ASSISTANT, ASSISTANT, SYSTEM, TOOL]))
    calls = draw(_ids) if role in (ASSISTANT, USER) else frozenset()
    results = draw(_ids) if role != SYSTEM else frozenset()
    return [ModelMessage(0, role, calls, results, draw(_tokens), draw(_sizes), draw(_deleted))]


@st.composite
def _exchange(draw: st.DrawFn) -> list[ModelMessage]:
    """Draw a question, tool calls, their results, and an answer.

    The results may be in one message or in several, in another order, and incomplete.
    """
    calls = draw(st.sets(st.sampled_from("abcd"), min_size=1, max_size=3))
    results = draw(st.permutations(sorted(calls)))
    results = results[: draw(st.integers(0, len(results)))] if draw(st.booleans()) else results
    result_role = draw(st.sampled_from([TOOL, USER]))
    in_one_message = draw(st.booleans())
    result_sets = (
        [frozenset(results)]
        if in_one_message and results
        else [frozenset({result}) for result in results]
    )
    messages = [
        ModelMessage(0, USER, tokens=draw(_tokens)),
        ModelMessage(0, ASSISTANT, frozenset(calls), tokens=draw(_tokens)),
    ]
    messages += [
        ModelMessage(0, result_role, results=ids, tokens=draw(_tokens), is_deleted=draw(_deleted))
        for ids in result_sets
    ]
    if draw(st.booleans()):
        interjection = draw(st.integers(1, len(messages)))
        messages.insert(interjection, ModelMessage(0, USER, tokens=1))
    if draw(st.booleans()):
        messages.append(ModelMessage(0, ASSISTANT, tokens=draw(_tokens)))
    return messages


def model_limits() -> st.SearchStrategy[ModelLimits]:
    """Draw limits, most of them tight."""
    return st.builds(
        ModelLimits,
        max_messages=st.integers(1, 12),
        max_tokens=st.one_of(st.just(0), st.integers(1, 25)),
        max_bytes=st.one_of(st.just(3 * 1024 * 1024), st.integers(1, 20)),
    )
