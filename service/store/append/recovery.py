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
    constraint,
    sqlstate,
    to_service_error,
)
from service.store.db.retries import MAX_CANCELLED_ATTEMPTS
from service.store.db.sqlstates import Failure

SESSION_DELETED = DIVISION_BY_ZERO
"""The error that the statement causes where a session was deleted between snapshot and lock."""
_CLASSES_OF_ROLE_AND_SCHEMA = ("0P", "3F", "42")
"""Classes of SQLSTATEs that concern whole tables. The others may concern one row: those of damaged
files, and those that a trigger raises."""


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
    """As LOOK_UP, after a short pause: another writer is storing the same message, or a look-up
    failed and may succeed if it runs again."""
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
    is_look_up: bool = False
    """Whether the look-up before the statement failed."""


def decide(batch: FailedBatch) -> Action:
    """Return what to do with the items of a failed statement."""
    if batch.item_count == 0:
        return Action.NOTHING
    if batch.failure in (Failure.LOST, Failure.OUTAGE):
        return Action.WAIT_FOR_DATABASE
    if _is_denied_to_all(batch):
        return Action.FAIL
    return _decide_look_up(batch) if batch.is_look_up else _decide_statement(batch)


def _decide_statement(batch: FailedBatch) -> Action:
    if batch.sqlstate == UNIQUE_VIOLATION and batch.attempts <= 1:
        return Action.LOOK_UP
    is_contended = _is_contention(batch)
    may_pass = (
        is_contended
        or _may_run_again(batch)
        or batch.sqlstate in (UNIQUE_VIOLATION, LOCK_NOT_AVAILABLE)
    )
    # Immediately: waits, pauses and statements of one item would delay those that follow.
    if not batch.is_apart and (batch.item_count > 1 or may_pass):
        return Action.RUN_SESSIONS_APART
    if is_contended:
        return Action.RETRY
    if batch.item_count > 1:
        return Action.RUN_ITEMS_ALONE
    if batch.sqlstate == UNIQUE_VIOLATION:
        return Action.LOOK_UP_AND_RETRY
    return Action.RETRY if may_pass else Action.FAIL


def _decide_look_up(batch: FailedBatch) -> Action:
    """Return what to do after the look-up of a batch failed.

    It would run again before every statement of the lane, so it is repeated only after a pause.
    """
    if batch.failure in (Failure.CONTENTION, Failure.LOCKED) or _may_run_again(batch):
        return Action.LOOK_UP_AND_RETRY
    # A look-up shows which session is at fault only if it reads no other one.
    is_shared = not batch.is_apart and batch.item_count > 1
    return Action.RUN_SESSIONS_APART if is_shared else Action.FAIL


def _is_denied_to_all(batch: FailedBatch) -> bool:
    """Return whether the database would deny each item of the batch in the same way."""
    state = batch.sqlstate or ""
    return batch.failure is Failure.DENIED and state[:2] in _CLASSES_OF_ROLE_AND_SCHEMA


def _may_run_again(batch: FailedBatch) -> bool:
    """Return whether the server cancelled the statement, and has not done so too often."""
    return batch.failure is Failure.CANCELLED and batch.attempts < MAX_CANCELLED_ATTEMPTS


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
