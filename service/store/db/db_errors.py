"""Classifies database errors: which are retried, and which error the caller receives in the end.

SQLSTATEs are those of PostgreSQL's appendix A. SQLAlchemy wraps most of them as a plain DBAPIError,
and connect errors arrive as bare OSError and TimeoutError. The classification therefore goes by the
SQLSTATE rather than by the class of the exception.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.errors import Conflict, DeadlineExceeded, InvalidArgument, ServiceError, Unavailable

DIVISION_BY_ZERO = "22012"
FOREIGN_KEY_VIOLATION = "23503"
UNIQUE_VIOLATION = "23505"
LOCK_NOT_AVAILABLE = "55P03"
FEATURE_NOT_SUPPORTED = "0A000"


class Failure(Enum):
    """The meaning of a database error for the transaction in which it occurred."""

    CONTENTION = auto()
    """Rolled back because of a concurrent transaction; may succeed again on a fresh snapshot."""
    LOCKED = auto()
    """Rolled back because another transaction held a lock for longer than the lock timeout."""
    LOST = auto()
    """The connection was lost. If COMMIT had been sent, the outcome is unknown."""
    REFUSED = auto()
    """No connection could be opened, or none was free in time: no statement was sent."""
    CANCELLED = auto()
    """The server cancelled the statement, because its timeout had passed."""
    BAD_DATA = auto()
    """A value that PostgreSQL cannot store, and that validation should have rejected."""
    FATAL = auto()
    """Any other error: a defect, or a violated constraint that the calling code handles first."""


_BY_SQLSTATE = {
    "40001": Failure.CONTENTION,  # serialization_failure
    "40P01": Failure.CONTENTION,  # deadlock_detected
    LOCK_NOT_AVAILABLE: Failure.LOCKED,
    "57014": Failure.CANCELLED,  # query_canceled
    "57P01": Failure.LOST,  # admin_shutdown: also how Neon suspends
    "57P02": Failure.LOST,  # crash_shutdown
    "57P03": Failure.REFUSED,  # cannot_connect_now
    "57P05": Failure.LOST,  # idle_session_timeout
    "25P03": Failure.LOST,  # idle_in_transaction_session_timeout
    "53300": Failure.REFUSED,  # too_many_connections
    "08001": Failure.REFUSED,  # sqlclient_unable_to_establish_sqlconnection
    "08004": Failure.REFUSED,  # sqlserver_rejected_establishment_of_sqlconnection
}
_BY_SQLSTATE_CLASS = {"08": Failure.LOST, "22": Failure.BAD_DATA}
# Neon's proxy, while it wakes a suspended compute, and PgBouncer, while its server is unavailable,
# report this in the message only.
_REFUSED_MESSAGES = (
    "couldn't connect to compute node",
    "server_login_retry",
    "server closed the connection",
    "pgbouncer cannot connect",
)


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's error that SQLAlchemy has wrapped."""
    while isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    cause = error.__cause__
    return (
        cause if isinstance(cause, asyncpg.PostgresError | asyncpg.InternalClientError) else error
    )


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, or None if the server sent none."""
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def constraint(error: BaseException) -> str | None:
    """Return the name of the violated constraint, or None."""
    name = getattr(driver_error(error), "constraint_name", None)
    return name if isinstance(name, str) else None


def classify(error: BaseException) -> Failure:
    """Return what a database error means for its transaction."""
    cause = driver_error(error)
    if isinstance(cause, asyncpg.InvalidCachedStatementError):
        return Failure.CONTENTION
    state = sqlstate(error)
    if state is not None:
        message = str(cause).lower()
        if any(part in message for part in _REFUSED_MESSAGES):
            return Failure.REFUSED
        return _BY_SQLSTATE.get(state) or _BY_SQLSTATE_CLASS.get(state[:2], Failure.FATAL)
    if isinstance(cause, PoolTimeoutError):
        return Failure.REFUSED
    if isinstance(cause, OSError | TimeoutError | asyncio.IncompleteReadError):
        return Failure.REFUSED
    # InternalClientError: the server closed the connection between two statements, and the driver
    # has not noticed yet.
    lost_errors = asyncpg.InterfaceError | InterfaceError | asyncpg.InternalClientError
    if isinstance(cause, lost_errors) or getattr(error, "connection_invalidated", False):
        return Failure.LOST
    return Failure.FATAL


def to_service_error(error: BaseException) -> ServiceError | None:
    """Return the error that the caller receives, or None when it is a defect (INTERNAL)."""
    match classify(error):
        case Failure.CONTENTION | Failure.LOCKED:
            return Conflict(
                "too many concurrent writers; retry", reason="CONTENTION", retry_after=0.1
            )
        case Failure.LOST | Failure.REFUSED:
            return Unavailable(
                "the database does not respond; retry",
                reason="DATABASE_UNAVAILABLE",
                retry_after=1.0,
            )
        case Failure.CANCELLED:
            return DeadlineExceeded("the database did not respond in time")
        case Failure.BAD_DATA:
            return InvalidArgument(
                "a value cannot be stored in the database", reason="MALFORMED_REQUEST"
            )
        case Failure.FATAL:
            return None
