"""Decides what happens to the items of an append statement that failed.

`decide` is a pure function: the appender describes the failed batch, and executes the action. Its
table is tested row by row in tests/unit/test_append_recovery.py.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from service.errors import Conflict, NotFound
from service.store.db.db_errors import (
    DIVISION_BY_ZERO,
    FOREIGN_KEY_VIOLATION,
    LOCK_NOT_AVAILABLE,
    UNIQUE_VIOLATION,
    Failure,
    constraint,
    sqlstate,
    to_service_error,
)

SESSION_DELETED = DIVISION_BY_ZERO
"""The error that the statement causes where a session was deleted between snapshot and lock."""


class Action(Enum):
    """A treatment of the items of a failed statement."""

    NOTHING = auto()
    """No caller waits for any of the items."""
    WAIT_FOR_DATABASE = auto()
    """Keep the items until the database answers, then look up which of them are stored."""
    LOOK_UP = auto()
    """Look up which messages are stored, then run the batch again without them."""
    RETRY = auto()
    """Run the same items again after a short pause, on a fresh snapshot."""
    LOOK_UP_AND_RETRY = auto()
    """As LOOK_UP, after a short pause: another writer is storing the same message."""
    RUN_SESSIONS_APART = auto()
    """Give each session a lane of its own, so that it neither fails nor delays the others."""
    RUN_ITEMS_ALONE = auto()
    """Run each item of the session in a statement of its own, so that only the faulty one fails."""
    FAIL = auto()
    """Answer the callers with the error."""


class FailedBatch(NamedTuple):
    """A statement that failed; it stored nothing, unless the connection was lost."""

    failure: Failure
    sqlstate: str | None
    item_count: int
    """Items whose callers still wait."""
    attempts: int
    """The most attempts that any of its items has had, this one included."""
    is_apart: bool
    """Whether its lane serves one session only."""


def decide(batch: FailedBatch) -> Action:
    """Return what to do with the items of a failed statement."""
    if batch.item_count == 0:
        return Action.NOTHING
    if batch.failure in (Failure.LOST, Failure.REFUSED):
        return Action.WAIT_FOR_DATABASE
    if batch.sqlstate == UNIQUE_VIOLATION and batch.attempts <= 1:
        return Action.LOOK_UP
    is_contended = _is_contention(batch)
    is_delayed = is_contended or batch.sqlstate in (UNIQUE_VIOLATION, LOCK_NOT_AVAILABLE)
    # Immediately: waits, pauses and statements of one item would delay those that follow.
    if not batch.is_apart and (batch.item_count > 1 or is_delayed):
        return Action.RUN_SESSIONS_APART
    if is_contended:
        return Action.RETRY
    if batch.item_count > 1:
        return Action.RUN_ITEMS_ALONE
    if batch.sqlstate == UNIQUE_VIOLATION:
        return Action.LOOK_UP_AND_RETRY
    return Action.RETRY if batch.sqlstate == LOCK_NOT_AVAILABLE else Action.FAIL


def _is_contention(batch: FailedBatch) -> bool:
    """Return whether a concurrent writer caused the failure, also by deleting a session."""
    return batch.sqlstate == SESSION_DELETED or batch.failure is Failure.CONTENTION


def final_error(user_id: str, error: BaseException) -> BaseException:
    """Return the error that the caller of an item receives when no attempt is left.

    Args:
        user_id: The owner of the item's session.
        error: The database error of its last attempt.
    """
    state = sqlstate(error)
    if state == FOREIGN_KEY_VIOLATION and constraint(error) == "chat_sessions_user_id_fkey":
        return NotFound.user(user_id)
    if state == UNIQUE_VIOLATION:
        return _contention("the same message is being stored by another request; retry")
    if state == SESSION_DELETED:
        # Another attempt would see that, or the session created again; but the time was up, or it
        # was deleted in every attempt.
        return _contention("the session is being deleted or created again; retry")
    return to_service_error(error) or error


def _contention(message: str) -> Conflict:
    return Conflict(message, reason="CONTENTION", retry_after=0.1)
