"""Migrates the schema to the revision of this build: in one transaction, one migrator at a time.

docs/how-to/migrations.md has the rules for migrations.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

import service
from service.store import tables
from service.store.db.db_errors import (
    DATABASE_ERRORS,
    NoServer,
    WrongRole,
    classify,
    driver_error,
    rule,
    sqlstate,
)
from service.store.db.dsn import Target
from service.store.db.engine import single_use_engine
from service.store.db.schema_names import quote
from service.store.db.sqlstates import Failure
from service.store.schema.location import UnusableDatabase, find
from service.store.schema.obstacles import inspect_site
from service.store.schema.version import VERSION_TABLE, SchemaVersion, schema_version

T = TypeVar("T")

_PACKAGE = Path(service.__file__).parent
# In a wheel, the scripts are in the package; in a checkout, they are next to it.
SCRIPTS_DIR = (
    _PACKAGE / "migrations" if (_PACKAGE / "migrations").is_dir() else _PACKAGE.parent / "alembic"
)
LOCK_TIMEOUT = "4s"
"""Maximum wait of a migration for a lock. All later statements on the table queue behind it."""
STATEMENT_TIMEOUT = "5s"
"""Maximum time of a statement, which holds locks. A migration that needs more raises it itself."""
MAX_ATTEMPTS = 6
"""Attempts of a migration while other transactions hold its locks."""
RETRY_PAUSE_S = 3.0
"""Average pause between two attempts, for the statements that have queued behind the migration."""
MIGRATOR_TIMEOUT_S = 600.0
"""Maximum wait for another migrator."""
START_TIMEOUT_S = 10.0
"""Maximum wait for a database that is starting."""
CONNECT_TIMEOUT_S = 15.0
ADVISORY_LOCK_KEY = 0x63686174_68697374
"""Key of the advisory lock that one migrator of the first release at a time holds."""
MIGRATOR_POLL_INTERVAL_S = 0.25
TOO_MANY_CONNECTIONS = "53300"
"""SQLSTATE of an error that the service, or another migrator, may cause for a moment."""

_LOCKS_HELD = (
    "other transactions hold the locks that the migration needs;"
    f" {MAX_ATTEMPTS} attempts were rolled back: end long transactions (see pg_stat_activity)"
    " and migrate again"
)
_STATEMENT_TOO_SLOW = (
    "a statement of the migration exceeded its statement_timeout, and the whole migration was"
    " rolled back: see https://chathistory.github.io/chathistory/how-to/migrations/"
)


class MigrationError(Exception):
    """A migration failed; the message says why and what to do."""


class MigrationResult:
    """Result of a migration; `str` returns it as a sentence."""

    def __init__(
        self, before: SchemaVersion, after: SchemaVersion, note: str | None = None
    ) -> None:
        self.before = before.revision
        self.after = after.revision
        self.problem = after.problem
        """Why this build does not work with the migrated schema; None if it does."""
        self.note = note
        """A further note for the operator, if there is one."""

    def __str__(self) -> str:
        after = _revision_name(self.after)
        if self.before != self.after:
            return f"migrated the schema from {_revision_name(self.before)} to {after}"
        newer = (
            f", newer than this build's revision ({tables.BUILD:04d})"
            if self.after > tables.BUILD
            else ""
        )
        return f"nothing to do: the schema is at {after}{newer}"


def _revision_name(revision: int) -> str:
    return f"revision {revision:04d}" if revision else "nothing"


def _ignore(_reason: str) -> None:
    pass


async def upgrade(target: Target, *, on_wait: Callable[[str], None] = _ignore) -> MigrationResult:
    """Migrate the schema to this build's revision; a schema of that or a newer one is unchanged.

    Args:
        target: The database. For a pooled Neon host, the direct host is used.
        on_wait: Called with the reason, as a sentence, when the migration has to wait.

    Raises:
        MigrationError: other transactions hold the locks, or the database belongs to another
            application.
        Exception: the connection failed.
    """
    return await _migrate(target.direct(), _upgrade, on_wait)


async def downgrade(target: Target, revision: str = "base") -> MigrationResult:
    """Revert migrations, for tests and for a developer's own database: it drops data.

    Raises:
        MigrationError: as `upgrade`.
        Exception: the connection failed.
    """
    return await _migrate(
        target.direct(), lambda connection: run_alembic(connection, "downgrade", revision), _ignore
    )


def _upgrade(connection: Connection) -> None:
    run_alembic(connection, "upgrade", "head")


async def _migrate(
    target: Target, work: Callable[[Connection], None], on_wait: Callable[[str], None]
) -> MigrationResult:
    """Run `work`, and retry while the database starts or others hold the locks that it needs."""
    loop = asyncio.get_running_loop()
    start_timeout_at = loop.time() + START_TIMEOUT_S
    blocked_attempts = 0
    while True:
        try:
            return await _attempt(target, work, on_wait)
        except WrongRole as error:
            raise MigrationError(f"{target.location} is {error}: migrate the primary") from None
        except DATABASE_ERRORS as error:
            failure = classify(error)
            if failure in (Failure.CONTENTION, Failure.LOCKED):
                blocked_attempts += 1
                if blocked_attempts == MAX_ATTEMPTS:
                    raise MigrationError(_LOCKS_HELD) from error
                on_wait("other transactions hold the locks that the migration needs: retrying")
                await asyncio.sleep(RETRY_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            elif (
                failure is Failure.OUTAGE
                and loop.time() < start_timeout_at
                and not _is_permanent(error)
            ):
                on_wait(f"{target.location} does not answer yet: retrying")
                await asyncio.sleep(1.0)
            elif failure is Failure.CANCELLED:
                raise MigrationError(_STATEMENT_TOO_SLOW) from error
            else:
                raise


def _is_permanent(error: BaseException) -> bool:
    """Return whether waiting cannot help: an operator must act, the name is wrong, or TLS fails."""
    cause, state = driver_error(error), sqlstate(error)
    if isinstance(cause, NoServer):
        return False  # A failover may be in progress.
    if isinstance(cause, UnusableDatabase):
        return True
    if state is not None:
        return bool(rule(error).cause) and state != TOO_MANY_CONNECTIONS
    return isinstance(cause, socket.gaierror | ssl.SSLError) or "rejected SSL upgrade" in str(cause)


async def _attempt(
    target: Target, work: Callable[[Connection], None], on_wait: Callable[[str], None]
) -> MigrationResult:
    async def step(connection: AsyncConnection, schema: str) -> MigrationResult:
        before = await schema_version(connection, schema)
        # Without this, Alembic would be imported, and use memory until the process ends.
        if work is _upgrade and before.revision >= tables.BUILD:
            return MigrationResult(before, before)
        note = None if before.revision else await _note_others(connection)
        await connection.run_sync(work)
        after = await schema_version(connection, schema)
        if work is _upgrade and after.revision < tables.BUILD:
            raise MigrationError(
                f"the migrations ended at revision {after.revision:04d} of {tables.BUILD:04d}, and"
                f" all of it was rolled back: does the table {VERSION_TABLE} in the schema {schema}"
                " belong to another application?"
            )
        return MigrationResult(before, after, note)

    return await _with_migrator_lock(target, step, on_wait)


async def _note_others(connection: AsyncConnection) -> str | None:
    """Return a note on other installations in a database to which one is added."""
    others = (await find(connection)).usable
    if not others:
        return None
    return (
        f"this database has another installation in the schema {', '.join(others)}: a service"
        " without CHAT_HISTORY_DB_SCHEMA will not know which of them to use"
    )


async def in_transaction(target: Target, work: Callable[[Connection], None]) -> None:
    """Run `work` as a migration: in one transaction with timeouts, while no other migrator runs.

    Its `search_path` is the schema of our tables only.

    Raises:
        MigrationError: another migrator did not end, or the database cannot be used.
        Exception: the connection or `work` failed.
    """

    async def step(connection: AsyncConnection, _schema: str) -> None:
        await connection.run_sync(work)

    await _with_migrator_lock(target, step, _ignore)


async def _with_migrator_lock(
    target: Target,
    step: Callable[[AsyncConnection, str], Awaitable[T]],
    on_wait: Callable[[str], None],
) -> T:
    """Run `step` in a transaction that holds the migrators' lock, in the schema of our tables."""
    engine = single_use_engine(target, connect_timeout_s=CONNECT_TIMEOUT_S)
    loop = asyncio.get_running_loop()
    timeout_at = loop.time() + MIGRATOR_TIMEOUT_S
    has_reported = False
    try:
        async with engine.connect() as connection:
            while True:
                async with connection.begin():
                    schema = await acquire_lock(connection, target.schema)
                    if schema is not None:
                        await _enter_schema(connection, schema)
                        return await step(connection, schema)
                # Wait outside of the transaction: CREATE INDEX CONCURRENTLY of the other migrator
                # would wait for the snapshot of this one.
                if loop.time() > timeout_at:
                    raise MigrationError(
                        f"another migration did not end in {MIGRATOR_TIMEOUT_S:.0f} s:"
                        " see pg_stat_activity"
                    )
                if not has_reported:
                    on_wait("waiting for another migration that is in progress")
                    has_reported = True
                await asyncio.sleep(MIGRATOR_POLL_INTERVAL_S)
    finally:
        await engine.dispose()


async def acquire_lock(connection: AsyncConnection, configured: str | None) -> str | None:
    """Acquire the migrators' lock on the schema for the transaction, and set its timeouts.

    Args:
        connection: The connection, in a transaction.
        configured: The schema that the configuration names, if any.

    Returns:
        The schema, which may not exist yet; None if another migrator works.

    Raises:
        MigrationError: the database cannot be used as it is.
        WrongRole: the server is a standby.
    """
    if await connection.scalar(select(func.pg_is_in_recovery())):
        # Only a pooler connects to one: otherwise the connector has rejected it.
        raise WrongRole("a standby")
    # Transaction locks: a session lock would be lost behind a pooler. The first one excludes
    # migrators of the first release, which know no other, and not those of other schemas.
    all_schemas = select(func.pg_try_advisory_xact_lock_shared(ADVISORY_LOCK_KEY))
    if not await connection.scalar(all_schemas):
        return None
    schema = await _choose_schema(connection, configured)
    if not await connection.scalar(select(func.pg_try_advisory_xact_lock(lock_key(schema)))):
        return None
    if await _choose_schema(connection, configured) != schema:
        return None  # Another migrator has just created or moved the tables.
    for name, value in (("lock_timeout", LOCK_TIMEOUT), ("statement_timeout", STATEMENT_TIMEOUT)):
        await connection.execute(text(f"SET LOCAL {name} = '{value}'"))
    return schema


async def _choose_schema(connection: AsyncConnection, configured: str | None) -> str:
    try:
        location = await find(connection)
        location.check_encoding()
        return location.choose(configured)
    except UnusableDatabase as error:
        raise MigrationError(str(error)) from None


def lock_key(schema: str) -> int:
    """Return the key of the advisory lock that one migrator of a schema at a time holds."""
    digest = hashlib.blake2b(f"chathistory {schema}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


async def _enter_schema(connection: AsyncConnection, schema: str) -> None:
    """Create the schema unless it exists, and make it the only one of the transaction's path.

    Released migrations name their tables without a schema. With any other schema in the path, they
    could change, or refer to, a table of another application.

    Raises:
        MigrationError: the role may not create it, or it holds tables of another application.
    """
    await create_schema(connection, schema)
    await connection.exec_driver_sql(f"SET LOCAL search_path TO {quote(schema)}")


async def create_schema(connection: AsyncConnection, schema: str) -> None:
    """Create a schema unless it exists.

    Raises:
        MigrationError: the role may not create it, or it holds tables of another application.
    """
    site = await inspect_site(connection, schema)
    if site.problem is not None:
        raise MigrationError(site.problem)
    if not site.exists:
        # Not IF NOT EXISTS, which fails for a role without CREATE on the database even if the
        # schema exists.
        await connection.exec_driver_sql(f"CREATE SCHEMA {quote(schema)}")


def run_alembic(connection: Connection, command: str, revision: str) -> None:
    """Run a command of Alembic on a connection, in its transaction.

    Raises:
        MigrationError: the scripts are missing, or none has the revision of the database.
    """
    from alembic import command as commands  # noqa: PLC0415 - see `_attempt`
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    if not (SCRIPTS_DIR / "env.py").exists():
        raise MigrationError(
            f"the migrations are not installed: {SCRIPTS_DIR} does not exist; reinstall the service"
        )
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS_DIR).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        getattr(commands, command)(config, revision)
    except CommandError as error:
        raise MigrationError(
            f"the table alembic_version holds a revision that this build does not know ({error}):"
            " does this database belong to another application?"
        ) from error
