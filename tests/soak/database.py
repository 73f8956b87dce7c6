"""The database of a soak: a primary, and a standby that has everything that was acknowledged.

Each replica of the service connects with a role of its own, which has exactly the documented rights
and whose password PostgreSQL verifies. The soak's own statements are those of a superuser.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

from sqlalchemy import URL

from service.store.db.dsn import parse
from service.store.schema.migrations import upgrade
from tests.support.cluster import Cluster, execute, fetch
from tests.support.pgbouncer import PASSWORD, PgBouncer, find_program
from tests.support.replicated_postgres import DATABASE, Node, ReplicatedPostgres

_RIGHTS = """
GRANT USAGE ON SCHEMA chathistory TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chathistory TO {role};
"""
_COUNT_SYNCHRONOUS = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"


class SoakDatabase:
    """A primary and a standby, and a pooler before the primary, as an async context manager."""

    def __init__(self, roles: Sequence[str], pooled_role: str) -> None:
        """Take the roles to create, and the one that connects through the pooler."""
        self.roles = roles
        self._pooled_role = pooled_role
        self._exit = ExitStack()
        self._pair = ReplicatedPostgres()
        self.nodes: list[Node] = []
        self.primary: Node
        self.standby: Node
        self.password = PASSWORD
        """The password of the roles."""
        self.pooler: PgBouncer | None = None
        """None if PgBouncer is not installed."""
        self._rejoin: Callable[[], None] | None = None
        """Makes the former primary a standby after a failover."""

    @property
    def url(self) -> str:
        """The superuser's connection string of the present primary."""
        return self.primary.url

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self._start)
            await upgrade(parse(self.url))
            for role in self.roles:
                await execute(self.url, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
                await execute(self.url, _RIGHTS.format(role=role))
            await self._wait_for_standby()
            if find_program() is not None:
                self.pooler = self._exit.enter_context(
                    PgBouncer(self._upstream, databases=[DATABASE])
                )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._exit.close)

    def _start(self) -> None:
        if os.geteuid() == 0:
            with Cluster():  # Creates the account for PostgreSQL.
                pass
        self._exit.enter_context(self._pair)
        self.nodes = self._pair.nodes
        self.primary, self.standby = self.nodes
        # Before the line that trusts all users. A clone copies the file.
        line = f"host all {','.join(self.roles)} 127.0.0.1/32 scram-sha-256\n"
        for node in self.nodes:
            file = node.data / "pg_hba.conf"
            file.write_text(line + file.read_text())

    @property
    def _upstream(self) -> str:
        return (
            f"postgresql://{self._pooled_role}@/{DATABASE}?host=127.0.0.1&port={self.primary.port}"
        )

    def url_of(self, role: str, ports: Sequence[int]) -> str:
        """Return the connection string of a role for these ports, one for each node, in order."""
        # The driver of SQLAlchemy's URL has one host.
        url = URL.create("postgresql", role, PASSWORD, "HOSTS", None, DATABASE)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        text = url.render_as_string(hide_password=False).replace("HOSTS", hosts)
        return f"{text}?sslmode=disable"

    # --- Faults of the primary.

    async def kill(self) -> None:
        """Kill the primary and its sessions."""
        await finish(self.primary.kill)

    async def stop(self) -> None:
        """Stop the primary; a no-op if it was killed."""
        await finish(self.primary.stop)

    async def start(self) -> None:
        """Start the stopped primary as it was."""
        await finish(self.primary.start)

    async def switch_over(self) -> None:
        """Stop the primary and promote the standby; `repair` makes the former one a standby."""
        await finish(lambda: self.primary.wait_until_received(self.standby))
        await self._promote(Node.stop, self._follow)

    async def fail_over(self, alone_s: float) -> None:
        """Kill the primary and promote the standby; `repair` makes a new standby.

        Args:
            alone_s: Seconds before that in which the standby receives nothing. An append that is
                acknowledged in that time is lost.
        """
        standby = self.standby
        await finish(lambda: self.primary.wait_until_received(standby))
        await _configure(standby, "primary_conninfo", "")
        try:
            await asyncio.sleep(alone_s)
            await self._promote(Node.kill, self._clone)
        finally:
            await execute(standby.url, "ALTER SYSTEM RESET primary_conninfo")

    async def _promote(self, end: Callable[[Node], None], rejoin: Callable[[], None]) -> None:
        old, new = self.primary, self.standby
        # The new primary must not wait for a standby that does not exist yet.
        await _configure(new, "synchronous_standby_names", "")

        def promote() -> None:
            end(old)
            new.promote()
            self.primary, self.standby, self._rejoin = new, old, rejoin
            if self.pooler is not None:
                self.pooler.redirect(self._upstream)

        await finish(promote)

    def _follow(self) -> None:
        self.standby.follow(self.primary)
        self.standby.start()

    def _clone(self) -> None:
        shutil.rmtree(self.standby.data)
        self.standby.clone(self.primary)
        self.standby.start()

    async def repair(self) -> None:
        """Give the primary its standby back after a failover, with everything that it has."""
        if self._rejoin is not None:
            await finish(self._rejoin)
            self._rejoin = None
            await self._wait_for_standby()

    async def _wait_for_standby(self) -> None:
        """Make commits wait for the standby, and wait until it has what was stored before."""
        # The parameters of the nodes differ, since one is a copy of the other.
        for node in self.nodes:
            await _configure(node, "synchronous_standby_names", "*")
        async with asyncio.timeout(60):
            while (await fetch(self.url, _COUNT_SYNCHRONOUS))[0][0] != 1:
                await asyncio.sleep(0.02)
        await finish(lambda: self.primary.wait_until_received(self.standby))

    # --- Faults of the roles.

    async def run(self, statement: str, roles: Sequence[str]) -> None:
        """Run a statement for each role, whose name replaces `{role}`."""
        for role in roles:
            await fetch(self.url, statement.format(role=role))

    async def end_sessions(self, roles: Sequence[str]) -> None:
        """End the sessions of these roles."""
        await fetch(
            self.url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY($1)",
            list(roles),
        )


async def _configure(node: Node, name: str, value: str) -> None:
    await execute(node.url, f"ALTER SYSTEM SET {name} = '{value}'")
    await fetch(node.url, "SELECT pg_reload_conf()")


async def finish(step: Callable[[], Any]) -> None:
    """Run a blocking step in a thread; when cancelled, wait for its end before that."""
    task = asyncio.ensure_future(asyncio.to_thread(step))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
