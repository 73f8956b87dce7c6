"""Brings the schema up to what this build brings: in one transaction, by one migrator at a time. The rules are in docs/how-to/migrations.md."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, NullPool, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

import service
from service.store import tables
from service.store.db.database import DATABASE_ERRORS
from service.store.db.db_errors import Failure, classify, driver_error
from service.store.db.dsn import Target
from service.store.schema.version import SchemaVersion, schema_version

T = TypeVar("T")

_PACKAGE = Path(service.__file__).parent
# In a wheel they lie in the package, in a checkout beside it.
SCRIPTS_DIR = (
    _PACKAGE / "migrations" if (_PACKAGE / "migrations").is_dir() else _PACKAGE.parent / "alembic"
)
LOCK_TIMEOUT = "4s"
"""How long a migration waits for a lock: everything that comes after queues behind it for as long."""
STATEMENT_TIMEOUT = "5s"
"""How long one of its statements may run, locks in hand. A migration that needs more sets more itself."""
MAX_ATTEMPTS = 6
"""How often a migration is tried whose locks others hold."""
RETRY_PAUSE_S = 3.0
"""Seconds between two tries, roughly: what waited behind the migration gets through meanwhile."""
MIGRATOR_TIMEOUT_S = 600.0
"""Seconds to wait for another migrator."""
START_TIMEOUT_S = 10.0
"""Seconds to wait for a database that is starting."""
CONNECT_TIMEOUT_S = 15.0
ADVISORY_LOCK_KEY = 0x63686174_68697374
"""Key of the advisory lock that one migrator at a time holds."""

_LOCKS_HELD = (
    f"others hold the locks that the migration needs; {MAX_ATTEMPTS} tries were rolled back: end long transactions (see pg_stat_activity) "
    "and migrate again"
)
_STATEMENT_TOO_SLOW = "a statement of the migration took longer than its statement_timeout, and all of it was rolled back: see docs/how-to/migrations.md"


class MigrationError(Exception):
    """The schema could not be brought up; the text says why and what to do."""


class MigrationResult:
    """What a migration came to, in words by `str`."""

    def __init__(self, before: SchemaVersion, after: SchemaVersion) -> None:
        self.before = before.revision
        self.after = after.revision
        self.problem = after.problem
        """Why this build does not work with the schema even so."""

    def __str__(self) -> str:
        if self.before != self.after:
            return f"migrated the schema from {_revision_name(self.before)} to {_revision_name(self.after)}"
        if self.after > tables.BUILD:
            return f"nothing to do: the schema is at {_revision_name(self.after)}, newer than this build brings ({tables.BUILD:04d})"
        return f"nothing to do: the schema is at {_revision_name(self.after)}"


def _revision_name(revision: int) -> str:
    return f"revision {revision:04d}" if revision else "nothing"


def _ignore(_words: str) -> None:
    pass


async def upgrade(target: Target, *, on_wait: Callable[[str], None] = _ignore) -> MigrationResult:
    """Bring the schema up to this build's revision; a schema that is there already, or newer, is left alone.

    Args:
        target: The database; of a pooled Neon host the direct one is taken.
        on_wait: Is told in words what is waited for.

    Raises:
        MigrationError: others hold the locks, or what is in the database is not ours.
        Whatever connecting raises.
    """
    return await _migrate(target.direct(), _upgrade, on_wait)


async def downgrade(target: Target, revision: str = "base") -> MigrationResult:
    """Take migrations back, for tests and for a developer's own database: it drops data.

    Raises:
        As `upgrade`.
    """
    return await _migrate(
        target.direct(), lambda connection: alembic(connection, "downgrade", revision), _ignore
    )


def _upgrade(connection: Connection) -> None:
    alembic(connection, "upgrade", "head")


async def _migrate(
    target: Target, work: Callable[[Connection], None], on_wait: Callable[[str], None]
) -> MigrationResult:
    """Try until it works: while the database starts or wakes, and while others hold what the migration must lock."""
    loop = asyncio.get_running_loop()
    timeout_at = loop.time() + START_TIMEOUT_S
    busy = 0
    while True:
        try:
            return await _attempt(target, work, on_wait)
        except DATABASE_ERRORS as error:
            failure = classify(error)
            if failure in (Failure.CONTENTION, Failure.LOCKED):
                busy += 1
                if busy == MAX_ATTEMPTS:
                    raise MigrationError(_LOCKS_HELD) from error
                on_wait(
                    "others hold the locks that the migration needs: trying again in some seconds"
                )
                await asyncio.sleep(RETRY_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads tries, keeps no secret
            elif failure is Failure.REFUSED and loop.time() < timeout_at and not _is_final(error):
                on_wait(f"{target.place} does not answer yet: trying again")
                await asyncio.sleep(1.0)
            elif failure is Failure.CANCELLED:
                raise MigrationError(_STATEMENT_TOO_SLOW) from error
            else:
                raise


def _is_final(error: BaseException) -> bool:
    """Whether a connection will not come about by waiting: the name or the certificate is wrong."""
    cause = driver_error(error)
    return isinstance(cause, socket.gaierror | ssl.SSLError) or "rejected SSL upgrade" in str(cause)


async def _attempt(
    target: Target, work: Callable[[Connection], None], on_wait: Callable[[str], None]
) -> MigrationResult:
    async def step(connection: AsyncConnection) -> MigrationResult:
        before = await schema_version(connection)
        # Alembic is not imported for nothing: it would cost memory for as long as the process lives.
        if work is _upgrade and before.revision >= tables.BUILD:
            return MigrationResult(before, before)
        await connection.run_sync(work)
        return MigrationResult(before, await schema_version(connection))

    return await _with_migrator_lock(target, step, on_wait)


async def in_transaction(target: Target, work: Callable[[Connection], None]) -> None:
    """Run `work` as migrations are run: in one transaction, with time-outs, and with no other migrator at work.

    Raises:
        MigrationError: another migrator does not end.
        Whatever connecting and `work` raise.
    """

    async def step(connection: AsyncConnection) -> None:
        await connection.run_sync(work)

    await _with_migrator_lock(target, step, _ignore)


async def _with_migrator_lock(
    target: Target, step: Callable[[AsyncConnection], Awaitable[T]], on_wait: Callable[[str], None]
) -> T:
    """Run `step` in a transaction when no other migrator is at work."""
    args = {"timeout": CONNECT_TIMEOUT_S} | target.connect_args
    engine = create_async_engine(
        target.url, connect_args=args, poolclass=NullPool, hide_parameters=True
    )
    loop = asyncio.get_running_loop()
    timeout_at = loop.time() + MIGRATOR_TIMEOUT_S
    told = False
    try:
        async with engine.connect() as connection:
            while True:
                async with connection.begin():
                    # Ends with the transaction: a session's lock would be lost behind a pooler.
                    if await connection.scalar(
                        select(func.pg_try_advisory_xact_lock(ADVISORY_LOCK_KEY))
                    ):
                        await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
                        await connection.execute(
                            text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'")
                        )
                        return await step(connection)
                # No transaction is open while it waits: CREATE INDEX CONCURRENTLY would wait for its snapshot in turn.
                if loop.time() > timeout_at:
                    raise MigrationError(
                        f"another migration has not ended in {MIGRATOR_TIMEOUT_S:.0f} s: see pg_stat_activity"
                    )
                if not told:
                    on_wait("another migration is under way: waiting for it")
                    told = True
                await asyncio.sleep(0.25)
    finally:
        await engine.dispose()


def alembic(connection: Connection, command: str, revision: str) -> None:
    """Run one of Alembic's commands on a connection, in its transaction.

    Raises:
        MigrationError: the scripts are missing, or do not know the revision that the database is at.
    """
    from alembic import command as commands  # noqa: PLC0415 - only when there is something to migrate
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    if not (SCRIPTS_DIR / "env.py").exists():
        raise MigrationError(f"the migrations are not installed: there is no {SCRIPTS_DIR}")
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS_DIR).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        getattr(commands, command)(config, revision)
    except CommandError as error:
        raise MigrationError(
            f"the table alembic_version holds what this build does not know ({error}): is it another application's?"
        ) from error
