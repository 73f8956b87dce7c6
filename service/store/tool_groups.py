"""Groups of messages in a prompt: tool calls with the messages that hold their results.

Rule 2 of `store/context.py` says which groups may be sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter
from typing import Any

from service.store.rows import MessageRow
from service.store.tables import Role

_by_seq = attrgetter("seq")


class Eligibility(Enum):
    """Whether rule 2 lets a group be sent."""

    ELIGIBLE = auto()
    EXCLUDED = auto()
    """It may not be sent, whatever the older messages are."""
    UNDECIDED = auto()
    """Older messages decide."""


@dataclass(slots=True, eq=False)
class Group:
    """Messages that are sent together or not at all, oldest first."""

    members: list[MessageRow]
    eligibility: Eligibility = Eligibility.ELIGIBLE


def form_groups(newest: Sequence[MessageRow], *, is_complete: bool) -> list[Group]:
    """Form groups of messages that are given newest first.

    Returns:
        The groups without the excluded ones, newest first. None is undecided if `is_complete`.
    """
    if not any(row.parts for row in newest):
        return [Group([row]) for row in newest]
    pairing = _Pairing()
    for row in reversed(newest):
        pairing.add(row)
    groups = pairing.groups()
    for group in groups:
        group.eligibility = pairing.eligibility(group, is_complete=is_complete)
    if not is_complete:
        # The calls of their results may be in older messages.
        groups += [Group([row], Eligibility.UNDECIDED) for row in pairing.unpaired]
    return sorted(
        (group for group in groups if group.eligibility is not Eligibility.EXCLUDED),
        key=lambda group: -group.members[-1].seq,
    )


class _Pairing:
    """Pairs tool calls with the messages that hold their results. Messages are added oldest first.

    All dictionaries except the first have the `seq` of a message as their key, and no entry for
    unpaired messages.
    """

    def __init__(self) -> None:
        self.unpaired: list[MessageRow] = []
        """Messages with a result whose call is missing, or is in an unpaired message itself."""
        self._caller_seqs: dict[str, int] = {}
        """By id of a call: the seq of the newest message with it."""
        self._open_calls: dict[int, set[str]] = {}
        """The message's calls that have no result yet."""
        self._result_counts: dict[int, int] = {}
        """Number of messages that hold results of the message's calls."""
        self._ordinals: dict[int, int] = {}
        """Position of the message among the paired ones."""
        self._groups: dict[int, Group] = {}
        self._callers_of_unpaired: set[int] = set()
        """Seqs of messages with a call whose result is in an unpaired message."""

    def add(self, row: MessageRow) -> None:
        """Pair a message with the earlier ones."""
        calls, results = _tool_ids(row)
        seqs = {self._caller_seqs.get(result) for result in results}
        caller_seqs = {seq for seq in seqs if seq is not None and seq in self._open_calls}
        if seqs <= caller_seqs:
            for result in results:
                self._open_calls[self._caller_seqs[result]].discard(result)
            for seq in caller_seqs:
                self._result_counts[seq] += 1
            self._join(row, caller_seqs)
            self._open_calls[row.seq] = calls
            self._result_counts[row.seq] = 0
            self._ordinals[row.seq] = len(self._ordinals)
        else:
            self.unpaired.append(row)
            self._callers_of_unpaired |= caller_seqs
        self._caller_seqs |= dict.fromkeys(calls, row.seq)

    def _join(self, row: MessageRow, caller_seqs: set[int]) -> None:
        """Put a message into the group of its callers; the groups of several callers are merged."""
        groups = list(dict.fromkeys(self._groups[seq] for seq in sorted(caller_seqs)))
        group = groups[0] if groups else Group([])
        for other in groups[1:]:
            group.members = sorted([*group.members, *other.members], key=_by_seq)
            self._groups |= {member.seq: group for member in other.members}
        group.members.append(row)
        self._groups[row.seq] = group

    def groups(self) -> list[Group]:
        """Return the groups of the paired messages."""
        return list(dict.fromkeys(self._groups.values()))

    def eligibility(self, group: Group, *, is_complete: bool) -> Eligibility:
        """Return whether a group may be sent."""
        seqs = [member.seq for member in group.members]
        if not is_complete and any(seq in self._callers_of_unpaired for seq in seqs):
            return Eligibility.UNDECIDED
        open_seqs = [seq for seq in seqs if self._open_calls[seq]]
        for seq in open_seqs:
            later_count = len(self._ordinals) - 1 - self._ordinals[seq]
            if self._result_counts[seq] < later_count:
                return Eligibility.EXCLUDED  # A message follows that holds no result of its calls.
        newest_unpaired_seq = self.unpaired[-1].seq if self.unpaired else 0
        if not is_complete and open_seqs and newest_unpaired_seq > open_seqs[0]:
            return Eligibility.UNDECIDED  # Older messages decide whether the one after is sent.
        return Eligibility.ELIGIBLE


def _tool_ids(row: MessageRow) -> tuple[set[str], set[str]]:
    """Return the ids of the calls that need a later result, and of the results of earlier calls."""
    if not row.parts:
        return set(), set()
    parts: list[dict[str, Any]] = json.loads(row.parts)
    calls = (
        {part["tool_call"]["id"] for part in parts if "tool_call" in part}
        if row.role == Role.ASSISTANT
        else set()
    )
    results = {part["tool_result"]["tool_call_id"] for part in parts if "tool_result" in part}
    return calls - results, results - calls
