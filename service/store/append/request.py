"""One caller's append on its way: what it wants stored, what is known of it, and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from service.errors import AlreadyExists, Conflict, FailedPrecondition, NotFound, ServiceError
from service.store.db.database import outage_deadline
from service.store.db.hot_pool import Record
from service.store.tables import SessionState

Key = tuple[str, str]
"""A user's id and a session's."""


class NewMessage(NamedTuple):
    """A message to store: its columns in their order. `parts` and `metadata` are JSON, or None when empty."""

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
    """What a session starts with, where an append makes it. `metadata` is JSON, or None when empty."""

    title: str = ""
    summary: str = ""
    metadata: str | None = None
    fingerprint: bytes = b""


class Entry(NamedTuple):
    """Where one message stands: its id, its place, when it was stored (microseconds since 1970), and whether it had been before."""

    id: str
    seq: int
    created_us: int
    replayed: bool


class Appended(NamedTuple):
    """What an append came to."""

    session_created: bool
    entries: list[Entry]


class Append:
    """One caller's append: all of it is stored, or none.

    Args:
        user_id: The owner, as canonical UUID text.
        session_id: The session, as canonical UUID text.
        messages: What to store; each has an id, and no id comes twice.
        deadline: On the running loop's clock.
        may_create: Whether a missing session is made.
        expected_last_seq: What the session's `last_seq` must be, if anything.
        new_session: Title, metadata (JSON) and fingerprint of a session that is made.
        check: Whether to ask first which of the messages are stored: the caller says that this is a retry.
        loop: The running loop, where the caller has it: asking for it costs a system call before Python 3.12.
    """

    __slots__ = (
        "arrived",
        "attempted",
        "check",
        "creates",
        "deadline",
        "expected",
        "future",
        "give_up",
        "key",
        "lost_races",
        "may_create",
        "messages",
        "new_session",
        "pending",
        "replayed",
        "run_alone",
        "session_created_us",
        "size",
        "tries",
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
        new_session: NewSession = NewSession(),  # noqa: B008 - an immutable tuple
        check: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        loop = loop or asyncio.get_running_loop()
        self.key: Key = (user_id, session_id)
        self.messages = messages
        self.pending = messages
        """Those that are not known to be stored."""
        self.replayed: dict[str, Entry] = {}
        self.session_created_us: int | None = None
        """When the session was made in which those are; no other with its id will do."""
        self.may_create = may_create
        self.expected = expected_last_seq
        self.creates = may_create and not expected_last_seq
        """Whether its statement may make the session: a missing one counts as empty, and holds nothing to replay."""
        self.new_session = new_session
        self.deadline = deadline
        self.give_up = outage_deadline(deadline, loop.time())
        self.check = check
        self.arrived = loop.time()
        self.attempted = False
        """Whether a try of our own may have stored it: then finding it is no replay, unless it is older than this item.

        Ages are compared to within the time that the database's answer takes: a retry that came so soon is not told from a first try.
        """
        self.run_alone = False
        """Whether it must be the only item of its statement."""
        self.tries = 0
        self.lost_races = 0
        """Of its tries, those in which others came first; neither a lock waited for nor a database away is one."""
        self.size = sum(message.size for message in messages)
        self.future: asyncio.Future[Appended] = loop.create_future()

    @property
    def is_conditional(self) -> bool:
        """Whether what is known of the session must still be true: then the statement takes nothing else to that session."""
        return self.expected is not None or self.session_created_us is not None

    @property
    def age_us(self) -> float:
        """Microseconds since it came."""
        return (asyncio.get_running_loop().time() - self.arrived) * 1e6

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the caller is gone."""
        if not self.future.done():
            self.future.set_exception(error)

    def finish(self, stored: Iterable[Entry], *, created: bool) -> None:
        """Answer with what is stored, unless the caller is gone."""
        if self.future.done():
            return
        entries = list(stored)
        if self.replayed:
            known = self.replayed | {entry.id: entry for entry in entries}
            entries = [known[message.id] for message in self.messages]
        self.future.set_result(Appended(created, entries))


def note_replays(item: Append, stored: dict[tuple[str, str, str], Record]) -> None:
    """Take what is stored out of the item's pending messages."""
    item.replayed, item.session_created_us, item.pending = {}, None, []
    for message in item.messages:
        row = stored.get((*item.key, message.id))
        if row is None:
            item.pending.append(message)
        elif row["fingerprint"] != message.fingerprint:
            item.fail(
                AlreadyExists(
                    "a message with this id and other content is stored",
                    reason="MESSAGE_ID_REUSED",
                    session_id=item.key[1],
                    message_id=message.id,
                )
            )
            return
        else:
            item.session_created_us = row["session_created_us"]
            ours = item.attempted and row["age"] <= item.age_us
            item.replayed[message.id] = Entry(message.id, row["seq"], row["at"], not ours)
    item.creates = item.may_create and not item.expected and item.session_created_us is None
    if not item.pending:
        first = item.replayed[item.messages[0].id]
        item.finish(
            (),
            created=not first.replayed
            and first.seq == 1
            and first.created_us == item.session_created_us,
        )


def refusal_of(item: Append, session: Record | None) -> ServiceError | None:
    """Say why the statement left an item out, or None when the reason has gone meanwhile."""
    session_id = item.key[1]
    if session is None and not item.may_create:
        return NotFound.session(session_id)
    if session is not None and session["state"] == SessionState.ARCHIVED:
        return FailedPrecondition(
            "the session is archived", reason="SESSION_ARCHIVED", session_id=session_id
        )
    last_seq = 0 if session is None else session["last_seq"]
    if item.expected is not None and last_seq != item.expected:
        return Conflict(
            f"last_seq is {last_seq}, not {item.expected}",
            reason="LAST_SEQ_MISMATCH",
            session_id=session_id,
            last_seq=last_seq,
        )
    return None
