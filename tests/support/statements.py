"""Statements that PostgreSQL receives during a test, read from its log."""

from __future__ import annotations

from tests.support.cluster import Cluster, LoggedStatement, statements_in
from tests.support.replicated_postgres import Node


class SentStatements:
    """Statements that a database received since this object was created, without the tests' own."""

    def __init__(self, server: Cluster | Node, database_url: str) -> None:
        self._log = server.postgres.log if isinstance(server, Cluster) else server.log
        self._database = database_name(database_url)
        self._start = self._log.stat().st_size

    def so_far(self) -> list[LoggedStatement]:
        """Return the statements."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            text = log.read().decode(errors="replace")
        return [logged for logged in statements_in(text) if logged.database == self._database]


def database_name(database_url: str) -> str:
    """Return the name of the database of a connection string."""
    return database_url.partition("?")[0].rpartition("/")[2]
