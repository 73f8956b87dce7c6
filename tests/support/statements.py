"""What PostgreSQL is sent during a test, as its log tells; the sentinel reads the same log by itself."""

from __future__ import annotations

from tests.support.cluster import Cluster, LoggedStatement, statements_in


class SentStatements:
    """What a database has been sent since this was made, the tests' own statements left out."""

    def __init__(self, cluster: Cluster, database_url: str) -> None:
        self._log = cluster.postgres.log
        self._database = database_name(database_url)
        self._from = self._log.stat().st_size

    def so_far(self) -> list[LoggedStatement]:
        """Return the statements."""
        with self._log.open("rb") as log:
            log.seek(self._from)
            text = log.read().decode(errors="replace")
        return [logged for logged in statements_in(text) if logged.database == self._database]


def database_name(database_url: str) -> str:
    """Return the name of the database of a connection string."""
    return database_url.partition("?")[0].rpartition("/")[2]
