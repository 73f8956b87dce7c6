"""The route from the services under test to their databases.

They connect directly, or through a transaction pooler with `pytest --through pgbouncer`. The tests'
own statements and the migrations always use direct connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import make_url

from tests.support.pgbouncer import PgBouncer, find_program
from tests.support.tools import skip_or_fail

ROUTES = ("pgbouncer",)
"""The choices of `--through`."""


class _Poolers:
    """One pooler for each PostgreSQL, started on first use."""

    def __init__(self) -> None:
        self.exit = ExitStack()
        self._by_socket: dict[str, PgBouncer] = {}

    def pooler_for(self, socket_dir: str, database_url: str) -> PgBouncer:
        if socket_dir not in self._by_socket:
            self._by_socket[socket_dir] = self.exit.enter_context(PgBouncer(database_url))
        return self._by_socket[socket_dir]


_poolers: _Poolers | None = None


@contextmanager
def use_route(through: str | None) -> Iterator[None]:
    """Make services connect through this pooler during a block, or directly if it is None."""
    global _poolers  # noqa: PLW0603 - one choice for the whole run, not a parameter of each test
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
    """Return the connection string with which a service connects to a test's database.

    A connection string without a socket already names a proxy, a pooler or several servers, and is
    returned as it is.
    """
    if _poolers is None or "," in database_url:  # SQLAlchemy's URLs have one server.
        return database_url
    url = make_url(database_url)
    socket_dir = url.query.get("host")
    if not isinstance(socket_dir, str):
        return database_url
    return _poolers.pooler_for(socket_dir, database_url).url(url.database or "")
