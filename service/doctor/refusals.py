"""Explains why a database could not be used."""

from __future__ import annotations

import socket
import ssl

import asyncpg

from service.store.db.db_errors import NoServer, WrongRole, driver_error, sqlstate
from service.store.db.dsn import Target
from service.store.db.sqlstates import rule_of
from service.store.schema.location import UnusableDatabase

_ADVICE = (
    ("57P03", "", "the server is starting or stopping: retry in a moment"),
    ("28000", "pg_hba.conf", "add a line for this role, database and address to pg_hba.conf"),
    ("28000", "not permitted to log in", "run ALTER ROLE … LOGIN"),
    ("28000", "does not exist", "create the role, or correct the user in DATABASE_URL"),
    ("42501", 'for database "', "run GRANT CONNECT ON DATABASE … TO the role"),
    (
        "53300",
        'for role "',
        "run ALTER ROLE … CONNECTION LIMIT -1, or lower CHAT_HISTORY_DB_POOL_SIZE",
    ),
    (
        "53300",
        'for database "',
        "run ALTER DATABASE … CONNECTION LIMIT -1, or lower CHAT_HISTORY_DB_POOL_SIZE",
    ),
    ("55000", "accepting connections", "run ALTER DATABASE … ALLOW_CONNECTIONS true"),
)
"""Advice by SQLSTATE and by words of the message. In other languages of the server's messages, the
advice on the SQLSTATE alone applies."""
_DATA_ERROR_CLASSES = ("22", "23")
"""Classes of SQLSTATEs whose messages quote data: data exceptions and violated constraints."""


def explain(error: BaseException, target: Target) -> str:
    """Return why the database could not be used and what to do, without a password or content."""
    cause = driver_error(error)
    code = sqlstate(error)
    host = target.url.host
    if code is not None or isinstance(cause, NoServer | WrongRole):
        return _explain_refusal(code, cause, target)
    if isinstance(cause, socket.gaierror):
        return f"the host name {host} does not resolve: check DATABASE_URL and this machine's DNS"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _explain_certificate(cause.verify_message, target)
    if "rejected SSL upgrade" in str(cause):
        return (
            f"{target.location} offers no TLS, but sslmode={target.ssl_mode} requires it: "
            "enable TLS there, or set sslmode=disable"
        )
    if isinstance(cause, TimeoutError):
        return f"{target.location} does not respond: check host, port and firewall"
    if isinstance(
        cause, ConnectionRefusedError | FileNotFoundError
    ) or "Connect call failed" in str(cause):
        return f"connection refused at {target.location}: is PostgreSQL running there?"
    if isinstance(cause, asyncpg.InterfaceError | OSError):
        problem = "" if isinstance(cause, UnusableDatabase) else " cannot be reached"
        return f"{target.location}{problem}: {cause}"
    return f"{target.location} cannot be used: {type(cause).__name__}"


def _explain_certificate(message: str, target: Target) -> str:
    if "certificate is not valid for" in message:
        return (
            f"the certificate of {target.location} is for another name ({message}): "
            "use the certificate's name in DATABASE_URL"
        )
    return (
        f"the certificate of {target.url.host} is not trusted ({message}): "
        "set its root certificate in the URL with sslrootcert=FILE"
    )


def _explain_refusal(code: str | None, cause: BaseException, target: Target) -> str:
    """Add advice to the server's own message, which may contain names but never the password."""
    if isinstance(cause, NoServer):
        return f"none of the servers in DATABASE_URL can be used: {cause}"
    if isinstance(cause, WrongRole):
        return f"{target.location} is {cause}: connect to the primary"
    assert code is not None  # noqa: S101 - the server has sent the error
    if code[:2] in _DATA_ERROR_CLASSES:
        return f"{target.location} rejected a value or a row (SQLSTATE {code})"
    advice = _advice(code, str(cause))
    suffix = f": {advice}" if advice else ""
    # An error of a statement, such as one without a privilege, leaves the connection open.
    is_statement = getattr(cause, "severity_en", None) == "ERROR"
    rejected = "a statement" if is_statement else "the connection"
    return f"{target.location} rejected {rejected}: {cause} (SQLSTATE {code}{suffix})"


def _advice(code: str, message: str) -> str:
    advice = (advice for state, words, advice in _ADVICE if state == code and words in message)
    return next(advice, rule_of(code).cause)
