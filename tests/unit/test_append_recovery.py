"""The table of append recovery: which action follows which failure of a statement."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from service.errors import Conflict, NotFound, Unavailable
from service.store.append.recovery import (
    Action,
    FailedBatch,
    decide,
    final_error,
)
from service.store.db.sqlstates import Failure
from tests.support.sqlstates import error_of as error_with_code

ONE_ITEM = FailedBatch(Failure.DEFECT, None, item_count=1, attempts=1, is_apart=False)
ITEMS = ONE_ITEM._replace(item_count=3)

LOST = {"failure": Failure.LOST, "sqlstate": "57P01"}
OUTAGE = {"failure": Failure.OUTAGE}
DUPLICATE = {"sqlstate": "23505"}
DEADLOCK = {"failure": Failure.CONTENTION, "sqlstate": "40P01"}
SESSION_DELETED = {"failure": Failure.BAD_DATA, "sqlstate": "22012"}
NO_CONTENT = {"sqlstate": "23502"}
LOCKED = {"failure": Failure.LOCKED, "sqlstate": "55P03"}
NO_USER = {"sqlstate": "23503"}
CANCELLED = {"failure": Failure.CANCELLED, "sqlstate": "57014"}
DENIED = {"failure": Failure.DENIED}
NO_PRIVILEGE = DENIED | {"sqlstate": "42501"}
FOREIGN_TRIGGER = DENIED | {"sqlstate": "P0001"}
DAMAGE = DENIED | {"sqlstate": "XX001"}
LOOK_UP = {"is_look_up": True}
SECOND = {"attempts": 2}
THIRD = {"attempts": 3}
APART = {"is_apart": True}

TABLE = {
    "no caller waits": (ITEMS, LOST | {"item_count": 0}, Action.NOTHING),
    "connection lost": (ITEMS, LOST, Action.WAIT_FOR_DATABASE),
    "connection lost, apart": (ITEMS, LOST | APART, Action.WAIT_FOR_DATABASE),
    "connection refused": (ITEMS, OUTAGE, Action.WAIT_FOR_DATABASE),
    "read-only": (ITEMS, OUTAGE | {"sqlstate": "25006"}, Action.WAIT_FOR_DATABASE),
    "disk full": (ITEMS, OUTAGE | {"sqlstate": "53100"}, Action.WAIT_FOR_DATABASE),
    "connection lost, one item, late": (ONE_ITEM, LOST | SECOND, Action.WAIT_FOR_DATABASE),
    "duplicate id, first attempt": (ITEMS, DUPLICATE, Action.LOOK_UP),
    "duplicate id, one item, first attempt": (ONE_ITEM, DUPLICATE, Action.LOOK_UP),
    "duplicate id, second attempt": (ITEMS, DUPLICATE | SECOND, Action.RUN_SESSIONS_APART),
    "duplicate id, one item, second": (ONE_ITEM, DUPLICATE | SECOND, Action.RUN_SESSIONS_APART),
    "duplicate id, apart": (ITEMS, DUPLICATE | SECOND | APART, Action.RUN_ITEMS_ALONE),
    "duplicate id, apart, one item": (
        ONE_ITEM,
        DUPLICATE | SECOND | APART,
        Action.LOOK_UP_AND_RETRY,
    ),
    "deadlock": (ITEMS, DEADLOCK, Action.RUN_SESSIONS_APART),
    "deadlock, one item": (ONE_ITEM, DEADLOCK, Action.RUN_SESSIONS_APART),
    "deadlock, apart": (ITEMS, DEADLOCK | SECOND | APART, Action.RETRY),
    "session deleted": (ITEMS, SESSION_DELETED, Action.RUN_SESSIONS_APART),
    "session deleted, one item": (ONE_ITEM, SESSION_DELETED, Action.RUN_SESSIONS_APART),
    "session deleted, apart": (ITEMS, SESSION_DELETED | SECOND | APART, Action.RETRY),
    "NULL in a NOT NULL column": (ONE_ITEM, NO_CONTENT, Action.FAIL),
    "locked": (ITEMS, LOCKED, Action.RUN_SESSIONS_APART),
    "locked, one item": (ONE_ITEM, LOCKED, Action.RUN_SESSIONS_APART),
    "locked, apart": (ITEMS, LOCKED | APART, Action.RUN_ITEMS_ALONE),
    "locked, apart, one item": (ONE_ITEM, LOCKED | APART, Action.RETRY),
    "no such user": (ITEMS, NO_USER, Action.RUN_SESSIONS_APART),
    "no such user, apart": (ITEMS, NO_USER | APART, Action.RUN_ITEMS_ALONE),
    "no such user, one item": (ONE_ITEM, NO_USER, Action.FAIL),
    "no such user, one item, apart": (ONE_ITEM, NO_USER | APART, Action.FAIL),
    "defect": (ONE_ITEM, {}, Action.FAIL),
    "cancelled": (ITEMS, CANCELLED, Action.RUN_SESSIONS_APART),
    "cancelled, one item": (ONE_ITEM, CANCELLED, Action.RUN_SESSIONS_APART),
    "cancelled, apart": (ITEMS, CANCELLED | SECOND | APART, Action.RUN_ITEMS_ALONE),
    "cancelled, apart, one item": (ONE_ITEM, CANCELLED | SECOND | APART, Action.RETRY),
    "cancelled, apart, third": (ONE_ITEM, CANCELLED | THIRD | APART, Action.FAIL),
    "cancelled, one item, third": (ONE_ITEM, CANCELLED | THIRD, Action.FAIL),
    "bad data": (ITEMS, {"failure": Failure.BAD_DATA}, Action.RUN_SESSIONS_APART),
    "no privilege": (ITEMS, NO_PRIVILEGE, Action.FAIL),
    "no privilege, apart": (ITEMS, NO_PRIVILEGE | APART, Action.FAIL),
    "no table": (ITEMS, DENIED | {"sqlstate": "42P01"}, Action.FAIL),
    "no schema": (ITEMS, DENIED | {"sqlstate": "3F000"}, Action.FAIL),
    "foreign trigger": (ITEMS, FOREIGN_TRIGGER, Action.RUN_SESSIONS_APART),
    "foreign trigger, apart": (ITEMS, FOREIGN_TRIGGER | APART, Action.RUN_ITEMS_ALONE),
    "foreign trigger, one item": (ONE_ITEM, FOREIGN_TRIGGER, Action.FAIL),
    "damage": (ITEMS, DAMAGE, Action.RUN_SESSIONS_APART),
    "damage, apart, one item": (ONE_ITEM, DAMAGE | APART, Action.FAIL),
    "look-up, no caller waits": (ITEMS, LOOK_UP | {"item_count": 0}, Action.NOTHING),
    "look-up, no privilege": (ITEMS, LOOK_UP | NO_PRIVILEGE, Action.FAIL),
    "look-up, connection lost": (ITEMS, LOOK_UP | LOST, Action.WAIT_FOR_DATABASE),
    "look-up, connection refused": (ITEMS, LOOK_UP | OUTAGE, Action.WAIT_FOR_DATABASE),
    "look-up, defect": (ITEMS, LOOK_UP, Action.RUN_SESSIONS_APART),
    "look-up, defect, apart": (ITEMS, LOOK_UP | APART, Action.FAIL),
    "look-up, defect, one item": (ONE_ITEM, LOOK_UP, Action.FAIL),
    "look-up, damage": (ITEMS, LOOK_UP | DAMAGE, Action.RUN_SESSIONS_APART),
    "look-up, damage, apart": (ITEMS, LOOK_UP | DAMAGE | APART, Action.FAIL),
    "look-up, deadlock": (ITEMS, LOOK_UP | DEADLOCK, Action.LOOK_UP_AND_RETRY),
    "look-up, locked": (ITEMS, LOOK_UP | LOCKED | APART, Action.LOOK_UP_AND_RETRY),
    "look-up, cancelled": (ITEMS, LOOK_UP | CANCELLED | SECOND, Action.LOOK_UP_AND_RETRY),
    "look-up, cancelled, third": (ONE_ITEM, LOOK_UP | CANCELLED | THIRD, Action.FAIL),
    "look-up, cancelled, apart": (ITEMS, LOOK_UP | CANCELLED | THIRD | APART, Action.FAIL),
}


@pytest.mark.parametrize(("batch", "changes", "action"), TABLE.values(), ids=TABLE.keys())
def test_failed_statement_leads_to_its_action(
    batch: FailedBatch, changes: dict[str, Any], action: Action
) -> None:
    assert decide(batch._replace(**changes)) is action


def error_of(kind: type[asyncpg.PostgresError], **fields: str) -> asyncpg.PostgresError:
    error = kind("")
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def test_missing_user_is_reported_as_not_found() -> None:
    error = error_of(asyncpg.ForeignKeyViolationError, constraint_name="chat_sessions_user_id_fkey")
    answer = final_error("alice", error)
    assert isinstance(answer, NotFound)
    assert answer.reason == "USER_NOT_FOUND"


@pytest.mark.parametrize(
    "error",
    [
        error_of(asyncpg.UniqueViolationError),
        error_of(asyncpg.DivisionByZeroError),
        error_of(asyncpg.DeadlockDetectedError),
        error_of(asyncpg.LockNotAvailableError),
    ],
    ids=["duplicate id", "session deleted", "deadlock", "locked"],
)
def test_lost_race_is_reported_as_contention(error: asyncpg.PostgresError) -> None:
    answer = final_error("alice", error)
    assert isinstance(answer, Conflict)
    assert answer.reason == "CONTENTION"


def test_unavailable_database_is_reported_as_unavailable() -> None:
    assert isinstance(final_error("alice", ConnectionRefusedError()), Unavailable)


def test_defect_is_passed_on() -> None:
    error = error_of(asyncpg.PostgresSyntaxError)
    assert final_error("alice", error) is error


@pytest.mark.parametrize("code", ["42501", "42P01", "57014", "P0001", "XX001"])
def test_error_that_an_operator_must_act_on_is_reported_as_unavailable(code: str) -> None:
    answer = final_error("alice", error_with_code(code))
    assert isinstance(answer, Unavailable)
    assert answer.reason == "DATABASE_UNAVAILABLE"
    assert answer.retry_after is not None
