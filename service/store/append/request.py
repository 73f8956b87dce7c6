"""One caller's append: the messages to store, the state of its attempts, and its result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from service.errors import AlreadyExists, Conflict, FailedPrecondition, NotFound, ServiceError
from service.store.db.hot_pool import Record
from service.store.db.retries import outage_deadline
from service.store.tables import SessionState

Key = tuple[str, str]
"""A user's id and a session's id."""


class NewMessage(NamedTuple):
    """A message to store: its columns in order. `parts` and `metadata` are JSON, None if empty."""

    id: str
    role: int
    content: str
    parts: str | None
    metadata: str | None
    token_count: int | None
    token_estimate: int
    size: int
    author: str
    feedback_score: float | None
    feedback_comment: str | None
    fingerprint: bytes


class NewSession(NamedTuple):
    """The columns of a session that an append creates; `metadata` is JSON, or None if empty."""

    title: str = ""
    summary: str = ""
    metadata: str | None = None
    fingerprint: bytes = b""


class Entry(NamedTuple):
    """One stored message of an append: its id, seq and time."""

    id: str
    seq: int
    created_us: int
    """When it was stored, in microseconds since 1970."""
    replayed: bool
    """Whether it had been stored by an earlier call."""


class Appended(NamedTuple):
    """The result of an append."""

    session_created: bool
    entries: list[Entry]


class Append:
    """One caller's append; all of it is stored, or none.

    Args:
        user_id: The owner, as canonical UUID text.
        session_id: The session, as canonical UUID text.
        messages: The messages to store; each has an id, and the ids differ.
        deadline: A time of the running loop's clock, in seconds.
        may_create: Whether a missing session is created.
        expected_last_seq: The `last_seq` that the session must have, or None.
        has_derived_id: Whether the request names no session, and its id is derived from the first
            message's. Such an append is refused if the session was deleted.
        new_session: Title, metadata (JSON) and fingerprint of a session that is created.
        loop: The running loop: looking it up costs a system call before Python 3.12.
    """

    __slots__ = (
        "arrived_at",
        "attempts",
        "deadline",
        "expected_last_seq",
        "future",
        "has_derived_id",
        "key",
        "look_up_first",
        "lost_races",
        "may_create",
        "may_have_committed",
        "may_insert_session",
        "messages",
        "new_session",
        "pending",
        "replayed",
        "run_alone",
        "session_created_us",
        "size_bytes",
        "wait_until",
    )  # fmt: skip

    def __init__(
        self,
        user_id: str,
        session_id: str,
        messages: list[NewMessage],
        deadline: float,
        *,
        may_create: bool = False,
        expected_last_seq: int | None = None,
        has_derived_id: bool = False,
        new_session: NewSession = NewSession(),  # noqa: B008 - an immutable tuple
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        loop = loop or asyncio.get_running_loop()
        self.key: Key = (user_id, session_id)
        self.messages = messages
        self.pending = messages
        """The messages that are not known to be stored."""
        self.replayed: dict[str, Entry] = {}
        """The messages that are known to be stored, by id."""
        self.session_created_us: int | None = None
        """When the session of the replayed messages was created, to distinguish it from a later
        session with its id; None without replayed messages."""
        self.may_create = may_create
        self.has_derived_id = has_derived_id
        self.expected_last_seq = expected_last_seq
        self.may_insert_session = may_create and not expected_last_seq
        """Whether its statement may create the session. A missing session counts as empty: it has
        last_seq 0 and no replayed message."""
        self.new_session = new_session
        self.deadline = deadline
        self.wait_until = outage_deadline(deadline, loop.time())
        """When it stops waiting for an unavailable database or a locked session."""
        self.look_up_first = False
        """Whether its messages may be stored already, and are looked up before the statement."""
        self.arrived_at = loop.time()
        self.may_have_committed = False
        """True once one of its own attempts may have been committed: a stored copy that is newer
        than this call is then not a replay.

        Ages are exact to within the response time of the database. If a retry follows its first
        call so quickly, its messages may be reported as stored by the retry.
        """
        self.run_alone = False
        """Whether it must be the only item of its statement."""
        self.attempts = 0
        self.lost_races = 0
        """Attempts that a concurrent writer defeated; lock timeouts and outages do not count."""
        self.size_bytes = sum(message.size for message in messages)
        self.future: asyncio.Future[Appended] = loop.create_future()

    @property
    def is_conditional(self) -> bool:
        """Whether it depends on the state of its session, and must be the only item for it."""
        return self.expected_last_seq is not None or self.session_created_us is not None

    @property
    def age_us(self) -> float:
        """Microseconds since it arrived."""
        return (asyncio.get_running_loop().time() - self.arrived_at) * 1e6

    def withdraw(self) -> None:
        """Release the messages of a cancelled caller, who no longer accounts for their bytes.

        The item remains in its queue until its turn, which may take as long as the database does.
        An item in a statement keeps them: the seqs of other items in it follow from their number.
        """
        if not self.attempts:
            self.messages = self.pending = []

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the caller was cancelled."""
        if not self.future.done():
            self.future.set_exception(error)

    def finish(self, stored: Iterable[Entry], *, session_created: bool) -> None:
        """Answer with the new messages and the replayed ones, unless the caller was cancelled."""
        if self.future.done():
            return
        entries = list(stored)
        if self.replayed:
            entries_by_id = self.replayed | {entry.id: entry for entry in entries}
            entries = [entries_by_id[message.id] for message in self.messages]
        self.future.set_result(Appended(session_created, entries))


def apply_stored(item: Append, stored: dict[tuple[str, str, str], Record]) -> None:
    """Move the stored messages of an item from pending to replayed; answer it if none is pending.

    The item fails with AlreadyExists if one of its ids is stored with other content.

    Args:
        item: The append.
        stored: Rows of the look-up, by user, session and message id.
    """
    item.replayed, item.session_created_us, item.pending = {}, None, []
    for message in item.messages:
        row = stored.get((*item.key, message.id))
        if row is None:
            item.pending.append(message)
        elif row["fingerprint"] != message.fingerprint:
            item.fail(
                AlreadyExists(
                    "a message with this id and different content is stored",
                    reason="MESSAGE_ID_REUSED",
                    session_id=item.key[1],
                    message_id=message.id,
                )
            )
            return
        else:
            item.session_created_us = row["session_created_us"]
            is_own = item.may_have_committed and row["age"] <= item.age_us
            item.replayed[message.id] = Entry(message.id, row["seq"], row["at"], not is_own)
    item.may_insert_session = (
        item.may_create and not item.expected_last_seq and item.session_created_us is None
    )
    if not item.pending:
        first = item.replayed[item.messages[0].id]
        item.finish(
            (),
            session_created=not first.replayed
            and first.seq == 1
            and first.created_us == item.session_created_us,
        )


def find_refusal(
    item: Append, session: Record | None, tombstone: Record | None
) -> ServiceError | None:
    """Return why the statement left an item out, or None if the reason no longer exists.

    Args:
        item: The append.
        session: The session's row of the look-up, or None if there is no such session.
        tombstone: The row of find_tombstones if a tombstone refuses the append, or None.
    """
    user_id, session_id = item.key
    if tombstone is not None and not tombstone["has_user"]:
        return NotFound.user(user_id)
    if tombstone is not None or (session is None and not item.may_create):
        return NotFound.session(session_id)
    if session is not None and session["state"] == SessionState.ARCHIVED:
        return FailedPrecondition(
            "the session is archived", reason="SESSION_ARCHIVED", session_id=session_id
        )
    last_seq = 0 if session is None else session["last_seq"]
    if item.expected_last_seq is not None and last_seq != item.expected_last_seq:
        return Conflict(
            f"last_seq is {last_seq}, not {item.expected_last_seq}",
            reason="LAST_SEQ_MISMATCH",
            session_id=session_id,
            last_seq=last_seq,
        )
    return None
