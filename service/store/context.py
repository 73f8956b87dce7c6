"""Selection of the messages that go into the next prompt (GetContext).

A *group* is a message, or an assistant message with tool calls together with the messages that hold
their results. Groups are selected by these rules:

1. Messages are returned in the order of `seq`.
2. A result belongs to the newest earlier call with its id. A message with a result whose call is
   missing is never sent. A group with a call that lacks a result is sent only when nothing but its
   own results follows the call, apart from messages that are never sent. Model APIs reject prompts
   that break these rules.
3. The newest group and the leading SYSTEM messages are mandatory: they are selected even above
   `max_messages` and `max_tokens`. Only `max_bytes` cuts them: first the last of the leading SYSTEM
   messages, then the end of the newest group.
4. Then older groups are added, newest first, while all limits hold. The first group that does not
   fit ends the selection.
5. When the session has a summary, the messages that it covers are left out. Leading SYSTEM messages
   are not.
6. All reads use an index. The search for older messages ends at LOOK_BACK_MESSAGES messages and
   LOOK_BACK_BYTES bytes, whatever the length of the session. A call further back counts as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import sqlalchemy as sa

from service.errors import NotFound
from service.store.db.read_batching import BatchedRead, Parameters, ReadBatcher, Rows
from service.store.messages import MAX_SEQ, PAGE_PARAMETERS, select_bounded
from service.store.rows import (
    MAX_PAGE_BYTES,
    MESSAGE_COLUMNS,
    SESSION_COLUMNS,
    MessageRow,
    SessionRow,
)
from service.store.tables import Role, chat_messages, chat_sessions
from service.store.tool_groups import Eligibility, form_groups

LOOK_BACK_MESSAGES = 1000
"""Messages read beyond `max_messages`, at most, to decide about the selected ones."""
LOOK_BACK_BYTES = 8 * MAX_PAGE_BYTES
"""Bytes of messages, which are held in memory, after which no older ones are read."""
MAX_LEADING_SYSTEM = 1000
"""Leading SYSTEM messages read, at most."""
MIN_OLDER_READ = 50
"""Older messages read at a time, at least, when the first read was not enough to decide."""


class Context(NamedTuple):
    """The messages of a prompt, oldest first, their tokens, and the count of omitted messages."""

    session: SessionRow
    messages: list[MessageRow]
    omitted_count: int
    token_count: int


class Limits(NamedTuple):
    """Limits of a prompt; `max_tokens` 0 means no limit."""

    max_messages: int
    max_tokens: int = 0
    max_bytes: int = MAX_PAGE_BYTES

    def allow(self, total: _Total) -> bool:
        """Return whether a prompt of this size keeps all limits."""
        return (
            total.messages <= self.max_messages
            and (not self.max_tokens or total.tokens <= self.max_tokens)
            and total.size_bytes <= self.max_bytes
        )


async def get(
    reads: ReadBatcher, user_id: str, session_id: str, limits: Limits, deadline: float
) -> Context:
    """Select the messages of the next prompt.

    Raises:
        NotFound: this user has no such session.
    """
    ids = {"user_id": user_id, "session_id": session_id}
    records = await reads.fetch(
        _FIRST_READ, deadline, **ids, seq=MAX_SEQ, limit=limits.max_messages
    )
    session, system, newest = _unpack_first_read(records)
    if session is None:
        raise NotFound.session(session_id)
    is_complete = _reached_start(newest, limits.max_messages)
    max_rows = limits.max_messages + LOOK_BACK_MESSAGES
    while (selected := select_messages(system, newest, limits, is_complete=is_complete)) is None:
        limit = min(max(MIN_OLDER_READ, len(newest)), max_rows - len(newest))
        records = await reads.fetch(_OLDER_READ, deadline, **ids, seq=newest[-1].seq, limit=limit)
        older = [MessageRow._make(record) for record in records]
        newest += older
        is_too_far = len(newest) >= max_rows or _size_bytes(newest) >= LOOK_BACK_BYTES
        is_complete = is_too_far or _reached_start(older, limit)
    omitted_count = max(0, session.message_count - len(selected))
    return Context(session, selected, omitted_count, sum(row.prompt_tokens for row in selected))


def _reached_start(rows: Sequence[MessageRow], limit: int) -> bool:
    """Return whether no older rows exist: fewer than `limit` were read, and bytes cut none."""
    return len(rows) < limit and _size_bytes(rows) < MAX_PAGE_BYTES


def _size_bytes(rows: Iterable[MessageRow]) -> int:
    return sum(row.size for row in rows)


class _Total(NamedTuple):
    """Size of a prompt."""

    messages: int = 0
    tokens: int = 0
    size_bytes: int = 0

    def plus_one_message(self) -> _Total:
        """Return the smallest total that a further message can lead to."""
        # `_replace` takes five times as long.
        return _Total(self.messages + 1, self.tokens, self.size_bytes)

    def plus(self, rows: Iterable[MessageRow]) -> _Total:
        messages, tokens, size_bytes = self
        for row in rows:
            messages += 1
            tokens += row.prompt_tokens
            size_bytes += row.size
        return _Total(messages, tokens, size_bytes)


_by_seq = attrgetter("seq")


def select_messages(
    system: Sequence[MessageRow],
    newest: Sequence[MessageRow],
    limits: Limits,
    *,
    is_complete: bool,
) -> list[MessageRow] | None:
    """Select the messages of the next prompt from those read, without tombstones.

    Args:
        system: The leading SYSTEM messages.
        newest: The newest messages, newest first. Leading SYSTEM messages may be among them.
        limits: Limits of the prompt.
        is_complete: Whether `newest` reaches back to the oldest message to be considered.

    Returns:
        The messages, oldest first, or None when the decision needs older ones.
    """
    leading_seqs = {row.seq for row in system}
    rows = [row for row in newest if row.seq not in leading_seqs] if leading_seqs else newest
    if _are_all_selected(system, rows, limits, is_complete=is_complete):
        return sorted([*system, *rows], key=_by_seq)
    selected: list[MessageRow] | None = None
    total = _Total()
    for group in form_groups(rows, is_complete=is_complete):
        if selected is not None and not limits.allow(total.plus_one_message()):
            break
        if group.eligibility is Eligibility.UNDECIDED:
            return None
        if selected is None:
            selected = _select_mandatory(system, group.members, limits.max_bytes)
            total = total.plus(selected)
            if total.messages < len(system) + len(group.members):
                break  # The byte limit has cut the mandatory messages: no older group fits.
            continue
        total = total.plus(group.members)
        if not limits.allow(total):
            break
        selected += group.members
    else:
        if not is_complete and (selected is None or limits.allow(total.plus_one_message())):
            return None
    if selected is None:
        selected = _longest_prefix(system, limits.max_bytes)
    return sorted(selected, key=_by_seq)


def _are_all_selected(
    system: Sequence[MessageRow], rows: Sequence[MessageRow], limits: Limits, *, is_complete: bool
) -> bool:
    """Return whether all these messages are known to be selected: none has parts, and all fit.

    This is the usual case. Without parts, each message is a group; forming the groups takes four
    times as long.
    """
    if not rows or any(row.parts for row in rows):
        return False
    total = _Total().plus(system).plus(rows)
    return limits.allow(total) and (is_complete or not limits.allow(total.plus_one_message()))


def _select_mandatory(
    system: Sequence[MessageRow], newest_group: list[MessageRow], max_bytes: int
) -> list[MessageRow]:
    """Return the newest group and the leading SYSTEM messages (rule 3), cut by bytes alone."""
    members = _longest_prefix(newest_group, max_bytes)
    if len(members) < len(newest_group):
        # Calls may lack results now. Shorten until rule 2 holds again.
        while _count_eligible(members) < len(members):
            members.pop()
    return members + _longest_prefix(system, max_bytes - _size_bytes(members))


def _count_eligible(messages: list[MessageRow]) -> int:
    return sum(len(group.members) for group in form_groups(messages[::-1], is_complete=True))


def _longest_prefix(rows: Iterable[MessageRow], max_bytes: int) -> list[MessageRow]:
    """Return the rows before the first one that exceeds `max_bytes` in total."""
    prefix: list[MessageRow] = []
    for row in rows:
        max_bytes -= row.size
        if max_bytes < 0:
            break
        prefix.append(row)
    return prefix


_session, _message = chat_sessions.c, chat_messages.c


def _is_session(parameters: Parameters) -> tuple[sa.ColumnElement[bool], ...]:
    return _session.user_id == parameters["user_id"], _session.id == parameters["session_id"]


def _select_newest(parameters: Parameters) -> sa.Select[Any]:
    """Select the messages before `seq` that no summary covers (rule 5), newest first."""
    covered_seq = (
        sa.select(
            sa.case(
                (_session.summary != sa.literal_column("''"), _session.summarized_through_seq),
                else_=sa.literal_column("0"),
            )
        )
        .where(*_is_session(parameters))
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    match = (_message.seq > covered_seq) & (_message.seq < parameters["seq"])
    return select_bounded(parameters, match, _message.seq.desc())


def _select_leading_system(parameters: Parameters) -> sa.Select[Any]:
    """Select the SYSTEM messages before the first message of another role."""
    first_other_seq = (
        sa.select(_message.seq)
        .where(
            _message.user_id == parameters["user_id"],
            _message.session_id == parameters["session_id"],
            _message.deleted_at.is_(None),
            _message.role != sa.literal_column(f"{Role.SYSTEM:d}"),
        )
        .order_by(_message.seq)
        .limit(sa.literal_column("1"))
        .correlate(*parameters.tables)
        .scalar_subquery()
    )
    return select_bounded(
        parameters,
        _message.seq < sa.func.coalesce(first_other_seq, sa.literal_column(str(MAX_SEQ))),
        _message.seq.asc(),
        sa.literal_column(str(MAX_LEADING_SYSTEM)),
    )


# The first read returns three kinds of rows, of these columns: the kind, the session, a message.
_SESSION_ROW, _SYSTEM_ROW, _NEWEST_ROW = range(3)
_FIRST_MESSAGE_COLUMN = 1 + len(SESSION_COLUMNS)


def _nulls(columns: Sequence[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
    return [sa.cast(sa.null(), column.type) for column in columns]


def _message_rows(kind: int, messages: sa.Select[Any]) -> sa.Select[Any]:
    columns = messages.subquery().c
    return sa.select(sa.literal_column(str(kind)), *_nulls(SESSION_COLUMNS), *columns)


def _select_first(parameters: Parameters) -> sa.CompoundSelect[Any]:
    """Select the session, its leading SYSTEM messages and its newest messages in one round trip."""
    session_row = (
        sa.select(sa.literal_column(str(_SESSION_ROW)), *SESSION_COLUMNS, *_nulls(MESSAGE_COLUMNS))
        .where(*_is_session(parameters))
        .correlate(*parameters.tables)
    )
    return sa.union_all(
        session_row,
        _message_rows(_SYSTEM_ROW, _select_leading_system(parameters)),
        _message_rows(_NEWEST_ROW, _select_newest(parameters)),
    )


_FIRST_READ = BatchedRead(_select_first, PAGE_PARAMETERS)
_OLDER_READ = BatchedRead(_select_newest, PAGE_PARAMETERS)


def _unpack_first_read(
    records: Rows,
) -> tuple[SessionRow | None, list[MessageRow], list[MessageRow]]:
    """Return the session, the leading SYSTEM messages, and the newest messages, newest first."""
    session: SessionRow | None = None
    system: list[MessageRow] = []
    newest: list[MessageRow] = []
    for record in records:
        if record[0] == _SESSION_ROW:
            session = SessionRow._make(record[1:_FIRST_MESSAGE_COLUMN])
        else:
            rows = system if record[0] == _SYSTEM_ROW else newest
            rows.append(MessageRow._make(record[_FIRST_MESSAGE_COLUMN:]))
    newest.sort(key=_by_seq, reverse=True)
    return session, system, newest
