"""What goes into the next prompt, by the words of the contract: a plain model, which looks at every message of a session.

The contract leaves open, and the docstrings of service/store/context.py say:
- A result belongs to the newest earlier call with its id, so an id may be used again. A second result of the same call goes with it too.
- A message one of whose results has no call there is never sent, whatever else is in it, its own calls included.
- Only an assistant's tool calls are calls. A message that holds both a call and its result needs nobody else.
- Groups whose results came in one message are one group.
- A call that lacks a result may be sent when nothing comes after it but its own results; messages that are never sent for want of
  their call do not count as coming after.
- The newest group is the one with the newest message. The first group that does not fit ends the choice.
- No limit of bytes is ever broken: of a newest group that is too large as much is kept of its beginning as may be sent, then leading
  SYSTEM messages from the first on, then older groups; again the first that does not fit ends the choice.
- Deleted messages are not there; leading SYSTEM messages are those before the first other message of the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from hypothesis import strategies as st

USER, ASSISTANT, SYSTEM, TOOL = 1, 2, 3, 4


@dataclass(frozen=True)
class Said:
    """One message of a session, for the model."""

    seq: int
    role: int
    calls: frozenset[str] = field(default=frozenset())
    results: frozenset[str] = field(default=frozenset())
    tokens: int = 1
    size: int = 1
    deleted: bool = False

    @property
    def asks(self) -> frozenset[str]:
        """Calls that other messages must answer."""
        return self.calls - self.results if self.role == ASSISTANT else frozenset()

    @property
    def answers(self) -> frozenset[str]:
        """Results of other messages' calls."""
        return self.results - self.calls if self.role == ASSISTANT else self.results


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    max_messages: int
    max_tokens: int = 0
    max_bytes: int = 3 * 1024 * 1024

    def allows(self, messages: Sequence[Said]) -> bool:
        return (
            len(messages) <= self.max_messages
            and (self.max_tokens == 0 or sum(each.tokens for each in messages) <= self.max_tokens)
            and sum(each.size for each in messages) <= self.max_bytes
        )


def expected(history: Sequence[Said], through: int, wanted: Wanted) -> list[int]:
    """Return the seqs of what goes into the prompt."""
    there = [each for each in history if not each.deleted]
    leading = list(takewhile(lambda each: each.role == SYSTEM, there))
    rest = [each for each in there[len(leading) :] if each.seq > through]
    callers = _callers(rest)
    rest = [each for each in rest if each.seq in callers]
    groups = _groups(rest, callers)
    newest = groups[0] if groups else []
    kept = max(
        (part for part in _beginnings(newest) if _size(part) <= wanted.max_bytes),
        key=len,
        default=[],
    )
    whole = len(kept) == len(newest)
    system = max(
        (part for part in _parts(leading) if _size([*kept, *part]) <= wanted.max_bytes), key=len
    )
    kept = [*kept, *system]
    if whole and len(system) == len(leading):
        for group in groups[1:]:
            if not wanted.allows([*kept, *group]):
                break
            kept = [*kept, *group]
    return sorted(each.seq for each in kept)


def _size(messages: Sequence[Said]) -> int:
    return sum(each.size for each in messages)


def _parts(messages: Sequence[Said]) -> list[Sequence[Said]]:
    return [messages[:count] for count in range(len(messages) + 1)]


def _beginnings(group: Sequence[Said]) -> list[Sequence[Said]]:
    """Return the beginnings of a group that may be sent by themselves: their open calls are at the end."""
    return [
        part
        for part in _parts(group)
        if len(part) == len(group) or all(_may_be_sent(each, part, _callers(part)) for each in part)
    ]


def _callers(rest: Sequence[Said]) -> dict[int, dict[str, int]]:
    """Return of each message that may be sent, by seq, whose calls its results answer."""
    found: dict[int, dict[str, int]] = {}
    for message in rest:
        asked = {
            result: max(
                (other.seq for other in rest if other.seq < message.seq and result in other.asks),
                default=0,
            )
            for result in message.answers
        }
        # The call's own message must be one that may be sent.
        if all(seq in found for seq in asked.values()):
            found[message.seq] = asked
    return found


def _groups(rest: Sequence[Said], callers: dict[int, dict[str, int]]) -> list[list[Said]]:
    """Return what is sent together or not at all, newest first, without what may not be sent."""
    groups = [{each.seq} for each in rest]
    for seq, asked in callers.items():
        together = [group for group in groups if seq in group or group & set(asked.values())]
        groups = [group for group in groups if group not in together] + [set().union(*together)]
    by_seq = {each.seq: each for each in rest}
    made = [
        [by_seq[seq] for seq in sorted(group)] for group in sorted(groups, key=max, reverse=True)
    ]
    return [group for group in made if all(_may_be_sent(each, rest, callers) for each in group)]


def _may_be_sent(message: Said, rest: Sequence[Said], callers: dict[int, dict[str, int]]) -> bool:
    answered = {
        result for asked in callers.values() for result, seq in asked.items() if seq == message.seq
    }
    if message.asks <= answered:
        return True
    later = [each for each in rest if each.seq > message.seq]
    return all(message.seq in callers[each.seq].values() for each in later)


# --- Sessions of any shape.

_ids = st.sets(st.sampled_from("abc"), max_size=2).map(frozenset)


@st.composite
def histories(draw: st.DrawFn, max_size: int = 14) -> list[Said]:
    """Draw a session: mixes of everything, and conversations as they really are, with something wrong in them here and there."""
    drafts = draw(st.lists(st.one_of(_anything(), _exchange()), max_size=max_size))
    flat = [each for draft in drafts for each in draft]
    head = draw(st.integers(0, 2))
    flat = [
        Said(0, SYSTEM, tokens=draw(_tokens), size=draw(st.integers(1, 4))) for _ in range(head)
    ] + flat
    return [
        Said(seq, e.role, e.calls, e.results, e.tokens, e.size, e.deleted)
        for seq, e in enumerate(flat, 1)
    ]


_tokens = st.integers(0, 5)
_deleted = st.sampled_from([False] * 5 + [True])


@st.composite
def _anything(draw: st.DrawFn) -> list[Said]:
    role = draw(st.sampled_from([USER, ASSISTANT, ASSISTANT, SYSTEM, TOOL]))
    calls = draw(_ids) if role in (ASSISTANT, USER) else frozenset()
    results = draw(_ids) if role != SYSTEM else frozenset()
    return [Said(0, role, calls, results, draw(_tokens), draw(st.integers(1, 4)), draw(_deleted))]


@st.composite
def _exchange(draw: st.DrawFn) -> list[Said]:
    """Draw a question, calls of tools, their results (in parallel, together, in another order, not all), and an answer."""
    calls = draw(st.sets(st.sampled_from("abcd"), min_size=1, max_size=3))
    results = draw(st.permutations(sorted(calls)))
    results = results[: draw(st.integers(0, len(results)))] if draw(st.booleans()) else results
    role = draw(st.sampled_from([TOOL, USER]))
    together = draw(st.booleans())
    answers = (
        [frozenset(results)] if together and results else [frozenset({each}) for each in results]
    )
    said = [
        Said(0, USER, tokens=draw(_tokens)),
        Said(0, ASSISTANT, frozenset(calls), tokens=draw(_tokens)),
    ]
    said += [
        Said(0, role, results=each, tokens=draw(_tokens), deleted=draw(_deleted))
        for each in answers
    ]
    if draw(st.booleans()):
        said.insert(draw(st.integers(1, len(said))), Said(0, USER, tokens=1))
    if draw(st.booleans()):
        said.append(Said(0, ASSISTANT, tokens=draw(_tokens)))
    return said


def wants() -> st.SearchStrategy[Wanted]:
    """Draw limits, tight ones as a rule."""
    return st.builds(
        Wanted,
        max_messages=st.integers(1, 12),
        max_tokens=st.one_of(st.just(0), st.integers(1, 25)),
        max_bytes=st.one_of(st.just(3 * 1024 * 1024), st.integers(1, 20)),
    )
