"""Faults that a failover, an operator or the state of the server brings about.

Each one is undone at its end, also when the soak fails in between.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg

from tests.soak.search_faults import suspended
from tests.soak.stack import Replica, Stack
from tests.support import commit_faults
from tests.support.cluster import connected_to, execute, fetch

MOVED_SCHEMA = "chathistory_elsewhere"
"""The name of the schema while it is moved."""
MAX_UPDATES = 200
"""Attempts to find a row in the outbox that no indexer has claimed."""
_DATE_AHEAD = """
UPDATE chathistory.search_outbox
SET due_at = due_at + interval '1 hour', owed_at = owed_at + interval '1 hour'
WHERE due_at < 'infinity' RETURNING lease_id IS NULL AS is_unclaimed
"""
_GRANT_TRIGGER = """
GRANT SELECT ON test_fault TO PUBLIC;
GRANT USAGE ON SEQUENCE test_faults TO PUBLIC;
"""


class DatabaseFaults:
    """Faults of the database that do not come from the network or from a crash."""

    def __init__(self, stack: Stack, rng: random.Random) -> None:
        self._stack = stack
        self._database = stack.database
        self._rng = rng
        self.kinds: dict[str, Callable[[], Awaitable[list[Replica]]]] = {
            "switched over": self._switch_over,
            "primary killed, standby promoted": self._fail_over,
            "sessions read-only": self._make_read_only,
            "disk full": self._fill_disk,
            "table locked": self._lock_table,
            "connections of the role limited": self._limit_connections,
            "password changed": self._change_password,
            "statement_timeout of the role": lambda: self._shorten("statement_timeout", 50),
            "lock_timeout of the role": lambda: self._shorten("lock_timeout", 5),
            "clock of PostgreSQL set back": self._date_rows_ahead,
            "schema moved": self._move_schema,
        }
        """The faults by name."""

    async def _wait(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.3, 4))

    # --- Failover.

    async def _switch_over(self) -> list[Replica]:
        await self._database.switch_over()
        return self._stack.replicas

    async def _fail_over(self) -> list[Replica]:
        await self._database.fail_over(self._rng.uniform(0, 0.5))
        return self._stack.replicas

    # --- Roles.

    async def _change_roles(
        self, change: str, remedy: str, *, ends_sessions: bool = True
    ) -> list[Replica]:
        """Change the roles of some replicas and end their sessions, so that new ones begin.

        Args:
            change: The statement, with `{role}`.
            remedy: The statement that undoes it.
            ends_sessions: Whether those that began in between must be ended, as they keep a
                parameter.
        """
        replicas = self._stack.some_replicas(self._rng)
        roles = [replica.role for replica in replicas]
        try:
            await self._database.run(change, roles)
            await self._database.end_sessions(roles)
            await self._wait()
        finally:
            await self._database.run(remedy, roles)
            if ends_sessions:
                await self._database.end_sessions(roles)
        return replicas

    async def _make_read_only(self) -> list[Replica]:
        """Make new sessions read-only. Those of PgBouncer are ended, as it cannot know that.

        A replica that connects directly must notice it, and replace its sessions.
        """
        replicas = await self._change_roles(
            "ALTER ROLE {role} SET default_transaction_read_only = on",
            "ALTER ROLE {role} RESET default_transaction_read_only",
            ends_sessions=False,
        )
        await self._database.end_sessions(
            [replica.role for replica in replicas if replica.is_pooled]
        )
        return replicas

    async def _limit_connections(self) -> list[Replica]:
        limit = self._rng.choice([0, 2])
        return await self._change_roles(
            f"ALTER ROLE {{role}} CONNECTION LIMIT {limit}",
            "ALTER ROLE {role} CONNECTION LIMIT -1",
            ends_sessions=False,
        )

    async def _change_password(self) -> list[Replica]:
        return await self._change_roles(
            "ALTER ROLE {role} PASSWORD 'another'",
            f"ALTER ROLE {{role}} PASSWORD '{self._database.password}'",
            ends_sessions=False,
        )

    async def _shorten(self, name: str, most_ms: int) -> list[Replica]:
        value_ms = self._rng.randint(1, most_ms)
        return await self._change_roles(
            f"ALTER ROLE {{role}} SET {name} = {value_ms}", f"ALTER ROLE {{role}} RESET {name}"
        )

    # --- Tables.

    async def _fill_disk(self) -> list[Replica]:
        """Make the commits of appends fail as they do on a full disk."""
        url = self._database.url
        try:
            await commit_faults.install(url)
            await execute(url, _GRANT_TRIGGER)
            await commit_faults.arm(url, "53100", 1_000)
            await self._wait()
        finally:
            await execute(url, "DROP TRIGGER IF EXISTS test_fault ON chat_messages")
        return self._stack.replicas

    async def _lock_table(self) -> list[Replica]:
        table = self._rng.choice(["users", "chat_sessions", "chat_messages"])
        async with connected_to(self._database.url) as holder:
            await holder.execute(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            try:
                await self._wait()
            finally:
                await holder.execute("ROLLBACK")
        return self._stack.replicas

    async def _move_schema(self) -> list[Replica]:
        """Rename the schema, as an operator who does not stop the service."""
        url = self._database.url
        await execute(url, f"ALTER SCHEMA chathistory RENAME TO {MOVED_SCHEMA}")
        try:
            await self._wait()
        finally:
            await execute(url, f"ALTER SCHEMA {MOVED_SCHEMA} RENAME TO chathistory")
        return self._stack.replicas

    async def _date_rows_ahead(self) -> list[Replica]:
        """Date rows of the outbox ahead by an hour, which a clock that is set back leaves behind.

        There is no undo: the indexers must correct them. Their processes are suspended,
        so that there are rows which none of them has claimed.
        """
        with suspended(self._stack.replicas):
            for _ in range(MAX_UPDATES):
                with suppress(asyncpg.DeadlockDetectedError):  # With an indexer.
                    rows = await fetch(self._database.url, _DATE_AHEAD)
                    if any(row["is_unclaimed"] for row in rows):
                        break
                await asyncio.sleep(0.02)
        return self._stack.replicas
