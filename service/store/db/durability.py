"""The settings of PostgreSQL on which the durability of acknowledged writes depends."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import ServiceError
from service.store.db.database import NO_OWNER, Database
from service.store.db.db_errors import DATABASE_ERRORS

READ_TIMEOUT_S = 2.0
"""Seconds in which the settings are read at the start; without an answer they are not logged."""

_log = structlog.get_logger(__name__)

# Every role may read these. A role that may not see the details of standbys sees their number.
# The function for messages in the log has another signature from PostgreSQL 17 on.
_READ = sa.text(
    "SELECT current_setting('synchronous_commit') AS synchronous_commit, "
    "current_setting('fsync') = 'on' AS fsync, "
    "current_setting('full_page_writes') = 'on' AS full_page_writes, "
    "current_setting('default_transaction_isolation') AS isolation, "
    "current_setting('client_min_messages') AS client_min_messages, "
    "current_setting('synchronous_standby_names') <> '' AS names_standbys, "
    "(SELECT count(*) FROM pg_stat_replication) AS standby_count, "
    "(SELECT bool_and(has_function_privilege(oid, 'EXECUTE')) FROM pg_proc "
    "WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = 'pg_logical_emit_message') "
    "AS may_confirm"
)


class Durability(NamedTuple):
    """Settings that a role has on a server. The defaults are as durable as promised."""

    synchronous_commit: str = "on"
    fsync: bool = True
    full_page_writes: bool = True
    isolation: str = "read committed"
    client_min_messages: str = "notice"
    names_standbys: bool = False
    """Whether `synchronous_standby_names` is set."""
    standby_count: int = 0
    """Servers that receive the log now."""
    may_confirm: bool = True
    """Whether the role may write messages to the log, with which a look-up waits for standbys."""


DURABLE = Durability()


class Weakness(NamedTuple):
    """A setting that is weaker than it should be."""

    setting: str
    value: str
    advice: str
    """The consequence, and what to do."""
    is_severe: bool = True
    """Whether acknowledged writes can be lost, or requests fail."""


async def read_durability(connection: AsyncConnection) -> Durability:
    """Read the settings that apply to a connection."""
    return Durability(**(await connection.execute(_READ)).one()._asdict())


def find_weaknesses(
    durability: Durability, *, raises_synchronous_commit: bool = True, is_neon: bool = False
) -> list[Weakness]:
    """Return the settings that are weaker than promised, or that have a price.

    Args:
        durability: The settings.
        raises_synchronous_commit: Whether appends set `synchronous_commit` themselves.
        is_neon: Whether the server is Neon's, which stores pages and the log elsewhere.
    """
    candidates = (
        _check_synchronous_commit(durability, is_raised=raises_synchronous_commit),
        None if is_neon else _check_fsync(durability),
        None if is_neon else _check_full_page_writes(durability),
        _check_standbys(durability),
        _check_client_min_messages(durability),
        _check_may_confirm(durability),
        _check_isolation(durability),
    )
    return [weakness for weakness in candidates if weakness is not None]


def _check_synchronous_commit(durability: Durability, *, is_raised: bool) -> Weakness | None:
    value = durability.synchronous_commit
    writes = "writes other than appends" if is_raised else "messages and other writes"
    remedy = "run ALTER ROLE … SET synchronous_commit = on"
    if value == "off":
        advice = f"a crash may lose acknowledged {writes}; {remedy}"
        return Weakness("synchronous_commit", value, advice)
    if value in ("local", "remote_write"):
        advice = f"a failover to a synchronous standby may lose acknowledged {writes}; {remedy}"
        return Weakness("synchronous_commit", value, advice, is_severe=durability.names_standbys)
    return None


def _check_fsync(durability: Durability) -> Weakness | None:
    if durability.fsync:
        return None
    advice = "a crash of the machine may destroy the database; set fsync = on"
    return Weakness("fsync", "off", advice)


def _check_full_page_writes(durability: Durability) -> Weakness | None:
    if durability.full_page_writes:
        return None
    advice = (
        "a crash of the machine may destroy pages, unless the file system writes them "
        "atomically; set full_page_writes = on"
    )
    return Weakness("full_page_writes", "off", advice)


def _check_standbys(durability: Durability) -> Weakness | None:
    if durability.names_standbys or not durability.standby_count:
        return None
    advice = (
        f"a failover to one of the servers that receive the log ({durability.standby_count}) may "
        "lose the last acknowledged writes; name those that commits shall wait for"
    )
    return Weakness("synchronous_standby_names", "empty", advice, is_severe=False)


def _check_client_min_messages(durability: Durability) -> Weakness | None:
    value = durability.client_min_messages
    if value not in ("error", "fatal", "panic"):
        return None
    advice = (
        "hides the warning that a commit is on no standby, so a failover may lose acknowledged "
        "writes; run ALTER ROLE … SET client_min_messages = warning"
    )
    return Weakness("client_min_messages", value, advice, is_severe=durability.names_standbys)


def _check_may_confirm(durability: Durability) -> Weakness | None:
    if durability.may_confirm:
        return None
    advice = "repeated requests fail; grant the role EXECUTE on this function"
    return Weakness("pg_logical_emit_message", "denied", advice)


def _check_isolation(durability: Durability) -> Weakness | None:
    if durability.isolation == "read committed":
        return None
    advice = (
        "concurrent writes of a session fail and are repeated, which is slower; "
        "run ALTER ROLE … SET default_transaction_isolation = 'read committed'"
    )
    return Weakness("default_transaction_isolation", durability.isolation, advice, is_severe=False)


async def log_weaknesses(database: Database, *, raises_synchronous_commit: bool) -> None:
    """Log each severe weakness of a database's settings, unless they cannot be read."""
    deadline = asyncio.get_running_loop().time() + READ_TIMEOUT_S
    try:
        durability = await database.read(read_durability, owner_id=NO_OWNER, deadline=deadline)
    except (ServiceError, *DATABASE_ERRORS):
        return
    for weakness in find_weaknesses(
        durability,
        raises_synchronous_commit=raises_synchronous_commit,
        is_neon=database.target.is_neon,
    ):
        if weakness.is_severe:
            _log.warning(
                "weak durability",
                setting=weakness.setting,
                value=weakness.value,
                advice=weakness.advice,
            )
