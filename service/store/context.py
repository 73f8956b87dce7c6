"""What goes into the next prompt: the newest messages within limits, tool calls together with their results.

A *group* is a message, or an assistant message with tool calls together with the messages that hold their results. A result belongs
to the newest earlier call with its id. A message with a result whose call is not there is never sent, and a call that lacks a result
only when nothing comes after it but its own results: model APIs refuse both.

A reply holds `max_bytes` at the most, or clients would refuse it. What is kept first, even above the other limits, is in that order:
the newest group (of one that is too large itself, its beginning), then leading SYSTEM messages from the first on, then older groups.
The first that does not fit ends the choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Select,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
    union_all,
)

from service.errors import NotFound
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher, Rows
from service.store.messages import MAX_PAGE_BYTES, MAX_SEQ, PAGE_PARAMETERS, bounded
from service.store.rows import MESSAGE_COLUMNS, SESSION_COLUMNS, MessageRow, SessionRow
from service.store.tables import Role, chat_messages, chat_sessions

LOOK_BACK = 1000
"""How many messages beyond the limit are searched for what is missing, so that no session's length counts."""
LOOK_BACK_BYTES = 8 * MAX_PAGE_BYTES
"""The same in bytes, which are held in memory."""
LEADING = 1000
"""How many leading SYSTEM messages are looked at."""
_CHUNK = 50
"""How many older messages are read at a time, at the least, where the first read did not decide."""


class Context(NamedTuple):
    """The messages of a prompt, oldest first, and what was left out."""

    session: SessionRow
    messages: list[MessageRow]
    omitted_count: int
    token_count: int


class Limits(NamedTuple):
    """How much fits into the prompt; `max_tokens` 0 is no limit."""

    max_messages: int
    max_tokens: int = 0
    max_bytes: int = MAX_PAGE_BYTES

    def hold(self, total: _Total) -> bool:
        """Whether so much fits."""
        return (
            total.messages <= self.max_messages
            and (not self.max_tokens or total.tokens <= self.max_tokens)
            and total.size <= self.max_bytes
        )


async def get(
    reads: ReadBatcher, user_id: str, session_id: str, limits: Limits, deadline: float
) -> Context:
    """Choose what goes into the next prompt.

    Raises:
        NotFound: this user has no such session.
    """
    ids = {"user_id": user_id, "session_id": session_id}
    opening = await reads.fetch(_OPENING, deadline, **ids, seq=MAX_SEQ, limit=limits.max_messages)
    session, system, newest = _unpack(opening)
    if session is None:
        raise NotFound.session(session_id)
    whole = _is_last(newest, limits.max_messages)
    farthest = limits.max_messages + LOOK_BACK
    while (chosen := select_messages(system, newest, limits, whole=whole)) is None:
        wanted = min(max(_CHUNK, len(newest)), farthest - len(newest))
        rows = await reads.fetch(_OLDER, deadline, **ids, seq=newest[-1].seq, limit=wanted)
        older = [MessageRow._make(row) for row in rows]
        newest += older
        far = len(newest) >= farthest or _size(newest) >= LOOK_BACK_BYTES
        whole = far or _is_last(older, wanted)
    omitted = max(0, session.message_count - len(chosen))
    return Context(session, chosen, omitted, sum(row.prompt_tokens for row in chosen))


def _is_last(rows: Sequence[MessageRow], wanted: int) -> bool:
    """Whether a read has come to the session's beginning: it returned less than asked for, and not because of its size."""
    return len(rows) < wanted and _size(rows) < MAX_PAGE_BYTES


def _size(rows: Iterable[MessageRow]) -> int:
    return sum(row.size for row in rows)


class _Total(NamedTuple):
    messages: int
    tokens: int
    size: int

    def with_one_more(self) -> _Total:
        """Return the least that another message makes of it."""
        return _Total(
            self.messages + 1, self.tokens, self.size
        )  # `_replace` takes five times as long.

    def plus(self, rows: Iterable[MessageRow]) -> _Total:
        messages, tokens, size = self
        for row in rows:
            messages, tokens, size = messages + 1, tokens + row.prompt_tokens, size + row.size
        return _Total(messages, tokens, size)


def select_messages(
    system: Sequence[MessageRow], newest: Sequence[MessageRow], limits: Limits, *, whole: bool
) -> list[MessageRow] | None:
    """Choose from a session's readable messages what goes into the next prompt, oldest first.

    Args:
        system: The leading SYSTEM messages.
        newest: The newest messages, newest first; leading SYSTEM ones may be among them.
        limits: How much fits.
        whole: Whether nothing older than `newest` counts.

    Returns:
        The messages, or None when older ones must be known to decide.
    """
    leading = {row.seq for row in system}
    rows = [row for row in newest if row.seq not in leading] if leading else newest
    if rows and not any(row.parts for row in rows):
        # As it is nearly always: each message is a group, and all of them fit. The way below takes four times as long.
        total = _Total(0, 0, 0).plus(system).plus(rows)
        if limits.hold(total) and (whole or not limits.hold(total.with_one_more())):
            return sorted([*system, *rows], key=_seq_of)
    kept: list[MessageRow] | None = None
    total = _Total(0, 0, 0)
    for group in _groups(rows, whole=whole):
        if kept is not None and not limits.hold(total.with_one_more()):
            break
        if group.verdict is _Verdict.UNKNOWN:
            return None
        if kept is None:
            kept = _first(system, group.members, limits.max_bytes)
            total = total.plus(kept)
            if total.messages < len(system) + len(group.members):
                break
            continue
        total = total.plus(group.members)
        if not limits.hold(total):
            break
        kept += group.members
    else:
        if not whole and (kept is None or limits.hold(total.with_one_more())):
            return None
    return sorted(_fitting(system, limits.max_bytes) if kept is None else kept, key=_seq_of)


def _first(
    system: Sequence[MessageRow], newest: list[MessageRow], max_bytes: int
) -> list[MessageRow]:
    """Return what is kept first of the leading SYSTEM messages and the newest group: all of it, unless that is too large to be sent."""
    kept = _fitting(newest, max_bytes)
    if len(kept) < len(newest):
        # A part of the results of its calls, and nothing else, may follow them.
        while sum(len(group.members) for group in _groups(kept[::-1], whole=True)) < len(kept):
            kept.pop()
    return kept + _fitting(system, max_bytes - _size(kept))


def _fitting(rows: Iterable[MessageRow], max_bytes: int) -> list[MessageRow]:
    """Return the rows up to the first that does not fit."""
    kept: list[MessageRow] = []
    for row in rows:
        max_bytes -= row.size
        if max_bytes < 0:
            break
        kept.append(row)
    return kept


class _Verdict(Enum):
    """What becomes of a group."""

    SENT = auto()
    """It may be sent, if it fits."""
    DROPPED = auto()
    """It may not be sent, whatever older messages say."""
    UNKNOWN = auto()
    """Older messages decide."""


@dataclass(slots=True, eq=False)
class _Group:
    """Messages that are sent together or not at all, oldest first."""

    members: list[MessageRow]
    verdict: _Verdict = _Verdict.SENT


def _groups(newest: Sequence[MessageRow], *, whole: bool) -> list[_Group]:
    """Put messages into groups, newest group first; those that may not be sent are left out.

    With `whole` there is nothing older, and no verdict is UNKNOWN.
    """
    if not any(row.parts for row in newest):
        return [_Group([row]) for row in newest]
    ties = _Ties()
    for row in reversed(newest):
        ties.add(row)
    groups = ties.groups()
    for group in groups:
        group.verdict = ties.verdict(group, whole=whole)
    if not whole:
        # Their call may be further back.
        groups += [_Group([row], _Verdict.UNKNOWN) for row in ties.strays]
    return sorted(
        (group for group in groups if group.verdict is not _Verdict.DROPPED),
        key=lambda group: -group.members[-1].seq,
    )


class _Ties:
    """Which messages hold the results of whose calls. Messages are added oldest first."""

    def __init__(self) -> None:
        self.strays: list[MessageRow] = []
        """Messages with a result whose call is not there, or stands in such a message."""
        self._caller: dict[str, int] = {}
        """By a call's id: the seq of the newest message that makes it."""
        self._open: dict[int, set[str]] = {}
        """By a message's seq: its calls without a result. Strays have no entry."""
        self._answers: dict[int, int] = {}
        """By a message's seq: how many messages hold results of its calls."""
        self._doubtful: set[int] = set()
        """Messages of whose calls a stray holds a result."""
        self._group: dict[int, _Group] = {}
        self._place: dict[int, int] = {}
        """By a message's seq: its place among those that are no strays."""

    def add(self, row: MessageRow) -> None:
        """Tie a message to those before it."""
        calls, results = _tools(row)
        callers = {self._caller.get(result) for result in results}
        known = {seq for seq in callers if seq is not None and seq in self._open}
        if callers <= known:
            for result in results:
                self._open[self._caller[result]].discard(result)
            for seq in known:
                self._answers[seq] += 1
            self._join(row, known)
            self._open[row.seq] = calls
            self._answers[row.seq] = 0
            self._place[row.seq] = len(self._place)
        else:
            self.strays.append(row)
            self._doubtful |= known
        self._caller |= dict.fromkeys(calls, row.seq)

    def _join(self, row: MessageRow, callers: set[int]) -> None:
        """Put a message into the group of those whose calls it answers; several groups become one."""
        found = list(dict.fromkeys(self._group[seq] for seq in sorted(callers)))
        group = found[0] if found else _Group([])
        for other in found[1:]:
            group.members = sorted([*group.members, *other.members], key=lambda member: member.seq)
            self._group |= {member.seq: group for member in other.members}
        group.members.append(row)
        self._group[row.seq] = group

    def groups(self) -> list[_Group]:
        """Return the groups."""
        return list(dict.fromkeys(self._group.values()))

    def verdict(self, group: _Group, *, whole: bool) -> _Verdict:
        """Say what becomes of a group: one with open calls may be sent at the end only."""
        seqs = [member.seq for member in group.members]
        if not whole and any(seq in self._doubtful for seq in seqs):
            return _Verdict.UNKNOWN
        heads = [seq for seq in seqs if self._open[seq]]
        if any(self._answers[head] < len(self._place) - 1 - self._place[head] for head in heads):
            return _Verdict.DROPPED  # Something else was said since.
        if not whole and heads and self.strays and self.strays[-1].seq > heads[0]:
            return _Verdict.UNKNOWN  # Something else was said since, if it may be sent.
        return _Verdict.SENT


def _tools(row: MessageRow) -> tuple[set[str], set[str]]:
    """Return the ids of the calls that wait for other messages, and of those that this message holds results of."""
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


_s, _m = chat_sessions.c, chat_messages.c


def _session_of(parameters: Parameters) -> tuple[ColumnElement[bool], ...]:
    return _s.user_id == parameters["user_id"], _s.id == parameters["session_id"]


def _newest(parameters: Parameters) -> Select[Any]:
    """Select the messages before `seq`, newest first, but for those that a summary covers."""
    summarized_through = case(
        (_s.summary != literal_column("''"), _s.summarized_through_seq),
        else_=literal_column("0"),
    )
    start = (
        select(summarized_through)
        .where(*_session_of(parameters))
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    return bounded(parameters, (_m.seq > start) & (_m.seq < parameters["seq"]), _m.seq.desc())


def _leading_system(parameters: Parameters) -> Select[Any]:
    """Select the SYSTEM messages before the first other one."""
    first_other = (
        select(_m.seq)
        .where(
            _m.user_id == parameters["user_id"],
            _m.session_id == parameters["session_id"],
            _m.deleted_at.is_(None),
            _m.role != literal_column(f"{Role.SYSTEM:d}"),
        )
        .order_by(_m.seq)
        .limit(literal_column("1"))
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    return bounded(
        parameters,
        _m.seq < func.coalesce(first_other, literal_column(str(MAX_SEQ))),
        _m.seq.asc(),
        literal_column(str(LEADING)),
    )


def _leg(
    kind: int, session: Sequence[ColumnElement[Any]] | None, messages: Select[Any] | None
) -> Select[Any]:
    """One leg of the opening read: its kind, the session's columns, a message's columns; what it has not is NULL."""
    left = session or [cast(null(), column.type) for column in SESSION_COLUMNS]
    rows = None if messages is None else messages.subquery()
    right = (
        [cast(null(), column.type) for column in MESSAGE_COLUMNS] if rows is None else list(rows.c)
    )
    return select(literal_column(str(kind)), *left, *right)


def _opening(parameters: Parameters) -> CompoundSelect[Any]:
    """Select the session, its leading SYSTEM messages and its newest messages in one round trip."""
    session = _leg(0, SESSION_COLUMNS, None).where(*_session_of(parameters))
    return union_all(
        session.correlate(*parameters.tables),
        _leg(1, None, _leading_system(parameters)),
        _leg(2, None, _newest(parameters)),
    )


_OPENING = BatchedRead(_opening, PAGE_PARAMETERS)
_OLDER = BatchedRead(_newest, PAGE_PARAMETERS)
_MESSAGE_AT = 1 + len(SESSION_COLUMNS)
_seq_of = attrgetter("seq")


def _unpack(rows: Rows) -> tuple[SessionRow | None, list[MessageRow], list[MessageRow]]:
    session: SessionRow | None = None
    system: list[MessageRow] = []
    newest: list[MessageRow] = []
    for row in rows:
        if row[0] == 0:
            session = SessionRow._make(row[1:_MESSAGE_AT])
        else:
            (system if row[0] == 1 else newest).append(MessageRow._make(row[_MESSAGE_AT:]))
    newest.sort(key=_seq_of, reverse=True)
    return session, system, newest
