"""Fixtures for faults: a proxy between service and PostgreSQL, and a PostgreSQL to be killed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import NamedTuple

import pytest

from service.server import Server
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.proxy import Proxy, postgres_proxy
from tests.support.servers import connected, serving


class ProxiedService(NamedTuple):
    """A service that connects to PostgreSQL through a proxy, which can break the connections."""

    server: Server
    chat: Chat
    proxy: Proxy


def calls_by_route(chat: Chat, session_id: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return a call for each route to the database.

    The routes are a pooled connection, the driver's connections for hot reads, a transaction, and
    the batches of appends.
    """
    return {
        "read": lambda: chat.get_session(session_id),
        "hot read": lambda: chat.page(session_id),
        "context": lambda: chat.context(session_id),
        "write": lambda: chat.update_session(["title"], id=session_id, title="new"),
        "append": lambda: chat.append(session_id, "more"),
    }


@pytest.fixture
async def proxied(database_url: str) -> AsyncGenerator[ProxiedService]:
    """Provide a service whose connections to the database the test can break."""
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        connected(server.address) as stub,
    ):
        yield ProxiedService(server, await Chat.of_new_user(stub), proxy)
        proxy.accept_connections()
        proxy.unblock()


@pytest.fixture
def own_cluster() -> Generator[Cluster]:
    """Provide a PostgreSQL for one test, which it may stop, kill and start."""
    with Cluster() as cluster:
        yield cluster
