"""The driver's own connections, where they break."""

from __future__ import annotations

from typing import Any, NoReturn

import asyncpg
import pytest

from service.store.driver import Statement, fetch_in_transaction
from tests.support.cluster import connected_to


async def test_a_connection_that_was_cut_meanwhile_tells_the_first_failure(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler has ended it, and somebody else has given it up before that is looked at."""

    async def ended(connection: asyncpg.Connection, *_: Any) -> NoReturn:
        connection.terminate()
        raise asyncpg.AdminShutdownError("ended")

    async with connected_to(database_url) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", ended)
            with pytest.raises(asyncpg.AdminShutdownError):
                await fetch_in_transaction(connection, Statement.from_text("SELECT 1"))
