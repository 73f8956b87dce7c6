"""Classifies database errors: which are retried, and which error the caller receives in the end.

`sqlstates.py` holds the rule for each SQLSTATE. SQLAlchemy wraps most errors as a plain DBAPIError,
and connect errors arrive as bare OSError and TimeoutError. The classification therefore goes by the
SQLSTATE rather than by the class of the exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.errors import Conflict, InvalidArgument, ServiceError, Unavailable
from service.store.db.sqlstates import UNKNOWN, Failure, Policy, Rule, Scope, rule_of

DIVISION_BY_ZERO = "22012"
FOREIGN_KEY_VIOLATION = "23503"
UNIQUE_VIOLATION = "23505"
LOCK_NOT_AVAILABLE = "55P03"
FEATURE_NOT_SUPPORTED = "0A000"
READ_ONLY = "25006"

_CONTENTION = Rule(Policy.RETRY, Failure.CONTENTION)
_LOST = Rule(Policy.RECONNECT, Failure.LOST, Scope.ALL)
_OUTAGE = Rule(Policy.OUTAGE, Failure.OUTAGE, Scope.ALL)
DATABASE_ERRORS = (
    DBAPIError,
    PoolTimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""The errors of the driver, SQLAlchemy and the socket when a statement or a connection fails."""

_FATAL_SEVERITIES = ("FATAL", "PANIC")
# Neon's proxy, while it wakes a suspended compute, and PgBouncer, while its server is unavailable,
# report this in the message only. No statement has reached a server then.
_REFUSED_MESSAGES = (
    "couldn't connect to compute node",
    "server_login_retry",
    "pgbouncer cannot connect",
)
# Of poolers and proxies whose connection to the server broke, perhaps during COMMIT.
_LOST_MESSAGES = ("server closed the connection", "server conn crashed")


class CommitNotReplicated(asyncpg.InterfaceError):
    """The wait for the synchronous standbys was cancelled: the commit is stored locally only."""


class WrongRole(ConnectionError):
    """The server is a standby, or is read-only although the URL demands otherwise."""

    sqlstate = READ_ONLY


class NoServer(ConnectionError):
    """None of several servers can be used.

    Args:
        failures: The address of each server, with the error of connecting to it.
    """

    def __init__(self, failures: Sequence[tuple[object, BaseException]]) -> None:
        super().__init__("; ".join(f"{address}: {_reason(error)}" for address, error in failures))
        self.failures = failures
        states = [state for _, error in failures if (state := sqlstate(error)) is not None]
        # A standby says more than a server that is down: the primary is missing.
        self.sqlstate = READ_ONLY if READ_ONLY in states else next(iter(states), None)


def _reason(error: BaseException) -> str:
    """Return the reason of a failure without the server's own text, which may hold names."""
    if isinstance(error, WrongRole):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    state = sqlstate(error)
    return f"SQLSTATE {state}" if state else type(error).__name__


def driver_error(error: BaseException) -> BaseException:
    """Return the error of the server, or else of the driver, that others have wrapped.

    asyncpg reports a FATAL error of the server as the cause of ConnectionDoesNotExistError.
    """
    while isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    while isinstance(error.__cause__, asyncpg.PostgresError | asyncpg.InternalClientError):
        error = error.__cause__
    return error


def _broke_in_operation(error: BaseException | None) -> bool:
    """Return whether the connection broke while a statement was in flight."""
    while error is not None:
        if isinstance(error, asyncpg.ConnectionDoesNotExistError):
            return True
        error = error.orig if isinstance(error, DBAPIError) else error.__cause__
    return False


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, or None if the server sent none."""
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def constraint(error: BaseException) -> str | None:
    """Return the name of the violated constraint, or None."""
    name = getattr(driver_error(error), "constraint_name", None)
    return name if isinstance(name, str) else None


def rule(error: BaseException) -> Rule:
    """Return the rule that applies to a database error."""
    cause = driver_error(error)
    if isinstance(cause, asyncpg.InvalidCachedStatementError):
        return _CONTENTION
    state = sqlstate(error)
    if state is None:
        return _rule_of_client(error, cause)
    known = rule_of(state)
    # The message of bad data quotes it.
    if known.failure is not Failure.BAD_DATA and (of_pooler := _rule_of_pooler(cause)):
        return of_pooler
    if _broke_in_operation(error):
        # Whatever the server said last: if COMMIT had been sent, the outcome is unknown.
        return _LOST._replace(cause=known.cause)
    is_fatal = getattr(cause, "severity_en", None) in _FATAL_SEVERITIES
    if is_fatal and known.failure is not Failure.LOST:
        # The server ends a session that it rejects at its start by FATAL, with any code: 42501
        # without the privilege CONNECT, 55000 if the database accepts no connections.
        return _OUTAGE._replace(cause=known.cause)
    return known


def _rule_of_pooler(cause: BaseException) -> Rule | None:
    """Return the rule for an error of a pooler or a proxy that only its message distinguishes."""
    # Without DETAIL, which may quote data.
    message = str(cause.args[0]).lower() if cause.args else ""
    if any(part in message for part in _REFUSED_MESSAGES):
        return _OUTAGE
    if any(part in message for part in _LOST_MESSAGES):
        return _LOST
    return None


def _rule_of_client(error: BaseException, cause: BaseException) -> Rule:
    """Return the rule for an error that the server did not send."""
    if isinstance(cause, PoolTimeoutError | OSError | TimeoutError | asyncio.IncompleteReadError):
        return _OUTAGE
    # InternalClientError: the server closed the connection between two statements, and the driver
    # has not noticed yet.
    lost_errors = asyncpg.InterfaceError | InterfaceError | asyncpg.InternalClientError
    if isinstance(cause, lost_errors) or getattr(error, "connection_invalidated", False):
        return _LOST
    return UNKNOWN


def classify(error: BaseException) -> Failure:
    """Return what a database error means for its transaction."""
    return rule(error).failure


def may_have_committed(error: BaseException) -> bool:
    """Return whether a COMMIT that failed with this error may have been carried out.

    A timeout of the driver says no more than a lost connection does.
    """
    return classify(error) is Failure.LOST or isinstance(driver_error(error), TimeoutError)


def to_service_error(error: BaseException) -> ServiceError | None:
    """Return the error that the caller receives, or None when it is a defect (INTERNAL)."""
    match classify(error):
        case Failure.CONTENTION | Failure.LOCKED:
            return Conflict(
                "too many concurrent writers; retry", reason="CONTENTION", retry_after=0.1
            )
        case Failure.LOST | Failure.OUTAGE:
            return _unavailable("the database does not respond; retry")
        case Failure.CANCELLED:
            return _unavailable("the database cancelled the statement; retry")
        case Failure.DENIED:
            return _unavailable("the database cannot run this statement until its operator acts")
        case Failure.BAD_DATA:
            return InvalidArgument(
                "a value cannot be stored in the database", reason="MALFORMED_REQUEST"
            )
        case Failure.DEFECT:
            return None


def _unavailable(message: str) -> Unavailable:
    return Unavailable(message, reason="DATABASE_UNAVAILABLE", retry_after=1.0)


def describe(error: BaseException) -> str:
    """Return what is wrong and what to do, in words of our own, for the log and for `check`."""
    cause, state = driver_error(error), sqlstate(error)
    if isinstance(cause, NoServer):
        return f"no server can be used: {cause}"
    if isinstance(cause, WrongRole):
        return f"the server is {cause}: connect to the primary (SQLSTATE {cause.sqlstate})"
    if state is not None and (advice := rule(error).cause):
        return f"{advice} (SQLSTATE {state})"
    return f"the database does not answer ({state or type(cause).__name__})"
