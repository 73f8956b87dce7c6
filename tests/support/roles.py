"""A role with exactly the documented rights of a service."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

from sqlalchemy import make_url

from tests.support.cluster import execute, fetch
from tests.support.statements import database_name


class Role(NamedTuple):
    """A role of a service on one database."""

    name: str
    url: str
    """Connection string of the database as this role."""


@asynccontextmanager
async def service_role(database_url: str) -> AsyncGenerator[Role]:
    """Create a role, and drop it at the end."""
    name = f"chat_{database_name(database_url)}"
    for statement in (
        f"CREATE ROLE {name} LOGIN",
        f"GRANT USAGE ON SCHEMA chathistory TO {name}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chathistory TO {name}",
    ):
        await fetch(database_url, statement)
    url = make_url(database_url).set(username=name).render_as_string(hide_password=False)
    yield Role(name, url)
    # The test may have made the database read-only.
    await execute(database_url, f"BEGIN READ WRITE; DROP OWNED BY {name}; DROP ROLE {name}; COMMIT")
