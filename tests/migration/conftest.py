"""Databases without a schema for the tests of migrations."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from service.store.db.dsn import Target, parse
from tests.support.cluster import Cluster


@pytest.fixture
def empty(empty_database_url: str) -> Target:
    """Return a database without a schema."""
    return parse(empty_database_url)


@pytest.fixture
async def other_database_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Yield the connection string of a second database without a schema."""
    name = await cluster.create_database(empty=True)
    yield cluster.url(name)
    await cluster.drop_database(name)
