"""What the tests of faults stand on: a proxy between the service and PostgreSQL, and a PostgreSQL that may be killed."""

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
    """A service whose connections to PostgreSQL can be broken."""

    server: Server
    chat: Chat
    proxy: Proxy


def calls_by_route(chat: Chat, session_id: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return a call of every way to the database: through the pool, by the driver, in a transaction, in a shared statement."""
    return {
        "read": lambda: chat.get_session(session_id),
        "hot read": lambda: chat.page(session_id),
        "context": lambda: chat.context(session_id),
        "write": lambda: chat.update_session(["title"], id=session_id, title="new"),
        "append": lambda: chat.append(session_id, "more"),
    }


@pytest.fixture
async def proxied(database_url: str) -> AsyncGenerator[ProxiedService]:
    """Give a service behind whose back the database can be cut off."""
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
    """Give a PostgreSQL of this test's own, which it may stop, kill and start."""
    with Cluster() as started:
        yield started
