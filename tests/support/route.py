"""How the services under test get to their databases: directly, or, with `pytest --through pgbouncer`, by way of a transaction pooler.

The tests themselves look at a database directly in either case, and migrations run directly, as they should.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import make_url

from tests.support.pgbouncer import PgBouncer, find_program
from tests.support.tools import skip_or_fail

ROUTES = ("pgbouncer",)
"""What a run can be asked to go through."""


class _Poolers:
    """One pooler for each PostgreSQL, started when it is first asked for."""

    def __init__(self) -> None:
        self.exit = ExitStack()
        self._by_socket: dict[str, PgBouncer] = {}

    def before(self, socket_dir: str, database_url: str) -> PgBouncer:
        if socket_dir not in self._by_socket:
            self._by_socket[socket_dir] = self.exit.enter_context(PgBouncer(database_url))
        return self._by_socket[socket_dir]


_poolers: _Poolers | None = None


@contextmanager
def use_route(through: str | None) -> Iterator[None]:
    """Have services go this way during a block; None: directly."""
    global _poolers  # noqa: PLW0603 - a choice of the whole run, which no test passes on
    if through is not None and find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    _poolers = _Poolers() if through is not None else None
    try:
        yield
    finally:
        if _poolers is not None:
            _poolers.exit.close()
        _poolers = None


def routed_url(database_url: str) -> str:
    """Return the connection string that a service is given for a test's database. What is no socket is on its way already."""
    url = make_url(database_url)
    socket_dir = url.query.get("host")
    if _poolers is None or not isinstance(socket_dir, str):
        return database_url
    return _poolers.before(socket_dir, database_url).url(url.database or "")
