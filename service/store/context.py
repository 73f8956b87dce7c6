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

Hot statements read the messages of the usual prompt, up to HOT_READ_BYTES each. When they do not
suffice, because messages are large or tombstones are many, `context_outlines` reads the outlines of
the messages first: what the rules need to know, without the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from operator import attrgetter
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import Conflict, NotFound
from service.store import context_outlines, sessions
from service.store.bounded_reads import HOT_READ_BYTES, Budget
from service.store.db.read_batching import BatchedRead, Parameters, Rows
from service.store.db.readers import BatchReader, Reader
from service.store.db.work_class import WorkClass
from service.store.message_pages import (
    MAX_SEQ,
    PAGE_PARAMETERS,
    SIZE_COLUMN,
    Unread,
    split_read,
    total_bytes,
)
from service.store.rows import (
    MAX_PAGE_BYTES,
    MESSAGE_COLUMNS,
    SESSION_COLUMNS,
    MessageRow,
    SessionRow,
)
from service.store.tables import Role, chat_sessions
from service.store.tool_groups import Eligibility, form_groups

LOOK_BACK_MESSAGES = 1000
"""Messages read beyond `max_messages`, at most, to decide about the selected ones."""
LOOK_BACK_BYTES = 8 * MAX_PAGE_BYTES
"""Bytes of messages after which no older ones are read. PostgreSQL reads their parts."""
MAX_LEADING_SYSTEM = 1000
"""Leading SYSTEM messages read, at most."""
MIN_OLDER_READ = 50
"""Older messages read at a time, at least, when the first read was not enough to decide."""
HOT_SYSTEM_BYTES = HOT_READ_BYTES // 4
"""Bytes of leading SYSTEM messages that the first read returns, at most."""
HOT_SYSTEM_SCANNED = 200
"""Rows, with tombstones, in which the first read looks for leading SYSTEM messages."""
MAX_SELECTIONS = 3
"""Selections by outlines, while messages of the selection are deleted before they are read."""


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
    reads: BatchReader,
    user_id: str,
    session_id: str,
    limits: Limits,
    budget: Budget,
    deadline: float,
) -> Context:
    """Select the messages of the next prompt.

    Raises:
        NotFound: this user has no such session.
        Overloaded: the prompt is large, and there is no room for it.
    """
    ids = {"user_id": user_id, "session_id": session_id}
    large_reads = reads.database.large_reads
    key = (user_id, session_id, limits)
    if key not in large_reads:
        records = await reads.fetch(
            _FIRST_READ, deadline, **ids, seq=MAX_SEQ, limit=limits.max_messages
        )
        first = _unpack_first_read(records)
        if first is None:
            raise NotFound.session(session_id)
        selected = await _select_by_hot_reads(reads, ids, first, limits, deadline)
        if selected is not None:
            return _context(first.session, selected)
        # The hot reads were a waste. The next call for this prompt does without them.
        large_reads.add(key)
        large_reads.add(user_id)
    context = await _get_by_outlines(reads.database, ids, limits, budget, deadline)
    if total_bytes(context.messages) <= HOT_READ_BYTES // 2:
        large_reads.discard(key)
    return context


def _context(session: SessionRow, selected: list[MessageRow]) -> Context:
    omitted_count = max(0, session.message_count - len(selected))
    return Context(session, selected, omitted_count, sum(row.prompt_tokens for row in selected))


async def _select_by_hot_reads(
    reads: BatchReader, ids: dict[str, str], first: _FirstRead, limits: Limits, deadline: float
) -> list[MessageRow] | None:
    """Select the messages of a prompt from hot reads; None if their bounds have cut them."""
    newest, unread = first.newest, first.unread
    has_all = len(newest) >= first.session.message_count
    system = _leading_system(newest) if has_all else first.system
    if system is None:
        return None
    is_complete = has_all or (unread is None and len(newest) < limits.max_messages)
    max_rows = limits.max_messages + LOOK_BACK_MESSAGES
    while (selected := select_messages(system, newest, limits, is_complete=is_complete)) is None:
        if unread is not None or total_bytes(newest) > HOT_READ_BYTES:
            return None
        limit = min(max(MIN_OLDER_READ, len(newest)), max_rows - len(newest))
        records = await reads.fetch(_OLDER_READ, deadline, **ids, seq=newest[-1].seq, limit=limit)
        older, unread = split_read(records)
        newest += older
        is_complete = len(newest) >= max_rows or (unread is None and len(older) < limit)
    return selected


def _leading_system(newest: Sequence[MessageRow]) -> list[MessageRow]:
    """Return the leading SYSTEM messages of a session of which all messages are given."""
    leading = takewhile(lambda row: row.role == Role.SYSTEM, reversed(newest))
    return list(islice(leading, MAX_LEADING_SYSTEM))


async def _get_by_outlines(
    database: Reader, ids: dict[str, str], limits: Limits, budget: Budget, deadline: float
) -> Context:
    """Select the messages of a prompt by their outlines, then read them."""
    charged_bytes = 0

    async def work(connection: AsyncConnection) -> Context:
        nonlocal charged_bytes
        for _ in range(MAX_SELECTIONS):
            session = await sessions.get(connection, ids["user_id"], ids["session_id"])
            outlines = await _select_outlines(connection, ids, limits)
            size_bytes = total_bytes(outlines)
            if size_bytes > charged_bytes:
                budget.charge(size_bytes - charged_bytes)
                charged_bytes = size_bytes
            seqs = [outline.seq for outline in outlines]
            selected = await context_outlines.read_messages(connection, ids, seqs)
            if len(selected) == len(outlines):
                return _context(session, selected)
        raise Conflict(
            "messages of the session are being deleted; retry",
            reason="CONTENTION",
            retry_after=0.1,
            session_id=ids["session_id"],
        )

    return await database.read(
        work, owner_id=ids["user_id"], deadline=deadline, work_class=WorkClass.EXPENSIVE
    )


async def _select_outlines(
    connection: AsyncConnection, ids: dict[str, str], limits: Limits
) -> list[MessageRow]:
    """Select the messages of a prompt; the rows have no texts."""
    system = await context_outlines.read_leading_system(
        connection, ids, MAX_LEADING_SYSTEM, LOOK_BACK_BYTES
    )
    newest: list[MessageRow] = []
    is_complete = False
    max_rows = limits.max_messages + LOOK_BACK_MESSAGES
    while (selected := select_messages(system, newest, limits, is_complete=is_complete)) is None:
        step = max(MIN_OLDER_READ, len(newest)) if newest else limits.max_messages
        limit = min(step, max_rows - len(newest))
        max_bytes = LOOK_BACK_BYTES - total_bytes(newest)
        before_seq = newest[-1].seq if newest else MAX_SEQ
        older = await context_outlines.read_before(connection, ids, before_seq, limit, max_bytes)
        newest += older
        is_complete = len(newest) >= max_rows or len(older) < limit
    return selected


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
    return members + _longest_prefix(system, max_bytes - total_bytes(members))


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


_session = chat_sessions.c

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
        .where(_session.user_id == parameters["user_id"], _session.id == parameters["session_id"])
        .correlate(*parameters.tables)
    )
    system = context_outlines.select_leading_system(
        parameters,
        sa.literal_column("0"),
        limit=sa.literal_column(str(MAX_LEADING_SYSTEM)),
        max_bytes=HOT_SYSTEM_BYTES,
        max_scanned=HOT_SYSTEM_SCANNED,
    )
    newest = context_outlines.select_newest(parameters, max_bytes=HOT_READ_BYTES - HOT_SYSTEM_BYTES)
    return sa.union_all(
        session_row, _message_rows(_SYSTEM_ROW, system), _message_rows(_NEWEST_ROW, newest)
    )


_FIRST_READ = BatchedRead(
    _select_first, PAGE_PARAMETERS, size_column=_FIRST_MESSAGE_COLUMN + SIZE_COLUMN
)
_OLDER_READ = BatchedRead(context_outlines.select_newest, PAGE_PARAMETERS, size_column=SIZE_COLUMN)


class _FirstRead(NamedTuple):
    """The result of the first read."""

    session: SessionRow
    system: list[MessageRow] | None
    """The leading SYSTEM messages; None if a bound of the read has cut them."""
    newest: list[MessageRow]
    """The newest messages, newest first."""
    unread: Unread | None
    """The row before them if a bound of the read has cut them."""


def _unpack_first_read(records: Rows) -> _FirstRead | None:
    session: SessionRow | None = None
    system_records: list[Sequence[Any]] = []
    newest_records: list[Sequence[Any]] = []
    for record in records:
        if record[0] == _SESSION_ROW:
            session = SessionRow._make(record[1:_FIRST_MESSAGE_COLUMN])
        else:
            rows = system_records if record[0] == _SYSTEM_ROW else newest_records
            rows.append(record[_FIRST_MESSAGE_COLUMN:])
    if session is None:
        return None
    system, unread_system = split_read(system_records)
    newest, unread = split_read(newest_records)
    return _FirstRead(session, None if unread_system else system, newest, unread)
