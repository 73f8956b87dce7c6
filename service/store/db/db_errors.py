"""Which failures of the database are retried, and what the caller is told when that does not help.

SQLSTATEs are those of PostgreSQL's appendix A. SQLAlchemy wraps most of them as a plain DBAPIError, and connect errors come as
bare OSError and TimeoutError, so the code itself decides and not the class.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.errors import Conflict, DeadlineExceeded, InvalidArgument, ServiceError, Unavailable


class Failure(Enum):
    """What a database error means for the transaction that met it."""

    CONTENTION = auto()
    """Rolled back because of others: the same transaction may succeed on a fresh snapshot."""
    LOCKED = auto()
    """Rolled back as somebody holds what it needs for longer than it was to wait."""
    LOST = auto()
    """The connection is gone. Nothing was committed unless COMMIT had been sent: then nobody knows."""
    REFUSED = auto()
    """No connection could be made; nothing was sent."""
    CANCELLED = auto()
    """The server stopped the statement, as its time was up."""
    BAD_DATA = auto()
    """A value that PostgreSQL cannot hold, which validation should have refused."""
    FATAL = auto()
    """Anything else: a defect, or a constraint that the caller knows the meaning of."""


_BY_SQLSTATE = {
    "40001": Failure.CONTENTION,  # serialization_failure
    "40P01": Failure.CONTENTION,  # deadlock_detected
    "55P03": Failure.LOCKED,  # lock_not_available
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
_BY_CLASS = {"08": Failure.LOST, "22": Failure.BAD_DATA}
# Neon's proxy, while it wakes a suspended compute, and PgBouncer, while its server is away, say so in words only.
_REFUSED_WORDS = (
    "couldn't connect to compute node",
    "server_login_retry",
    "server closed the connection",
    "pgbouncer cannot connect",
)


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's own error under SQLAlchemy's wrapping."""
    while isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    cause = error.__cause__
    return (
        cause if isinstance(cause, asyncpg.PostgresError | asyncpg.InternalClientError) else error
    )


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, if the server sent one."""
    state = getattr(driver_error(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def constraint(error: BaseException) -> str | None:
    """Return the name of the violated constraint, or for a NOT NULL the column's."""
    cause = driver_error(error)
    name = getattr(cause, "constraint_name", None) or getattr(cause, "column_name", None)
    return name if isinstance(name, str) else None


def classify(error: BaseException) -> Failure:
    """Say what a database error means."""
    cause = driver_error(error)
    if isinstance(cause, asyncpg.InvalidCachedStatementError):
        return Failure.CONTENTION
    state = sqlstate(error)
    if state is not None:
        words = str(cause).lower()
        if any(word in words for word in _REFUSED_WORDS):
            return Failure.REFUSED
        return _BY_SQLSTATE.get(state) or _BY_CLASS.get(state[:2], Failure.FATAL)
    if isinstance(cause, PoolTimeoutError):
        return Failure.REFUSED
    if isinstance(cause, OSError | TimeoutError | asyncio.IncompleteReadError):
        return Failure.REFUSED
    # InternalClientError: the server has ended the connection between two statements, and the driver has not heard the end of it.
    lost = asyncpg.InterfaceError | InterfaceError | asyncpg.InternalClientError
    if isinstance(cause, lost) or getattr(error, "connection_invalidated", False):
        return Failure.LOST
    return Failure.FATAL


def to_service_error(error: BaseException) -> ServiceError | None:
    """Return what the caller is told about a database error, or None when it is a defect (INTERNAL)."""
    match classify(error):
        case Failure.CONTENTION | Failure.LOCKED:
            return Conflict(
                "too many writers at once; try again", reason="CONTENTION", retry_after=0.1
            )
        case Failure.LOST | Failure.REFUSED:
            return Unavailable(
                "the database does not answer; try again",
                reason="DATABASE_UNAVAILABLE",
                retry_after=1.0,
            )
        case Failure.CANCELLED:
            return DeadlineExceeded("the database did not answer in time")
        case Failure.BAD_DATA:
            return InvalidArgument("a value cannot be stored", reason="MALFORMED_REQUEST")
        case Failure.FATAL:
            return None
