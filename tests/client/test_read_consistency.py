"""`read_consistency`: the client sends it with the reads that a replica may serve."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from chathistory_client import ChatHistoryClient, MessageOrder, SearchMode, message
from tests.support.clients import client_of
from tests.support.lagging import outcomes, read_from_replica
from tests.support.route import routed_url
from tests.support.servers import serving


async def pull_export(client: ChatHistoryClient, **arguments: Any) -> list[Any]:
    return [item async for item in client.export_user_data(**arguments)]


async def list_all_messages(client: ChatHistoryClient, **arguments: Any) -> list[Any]:
    order = MessageOrder.MESSAGE_ORDER_DESC
    return [item async for item in client.list_messages(order=order, page_size=4, **arguments)]


async def test_reads_may_come_from_the_replica_where_the_program_accepts_that(
    database_url: str,
) -> None:
    async with (
        serving(
            database_url, DATABASE_READ_URL=routed_url(database_url), read_max_lag=60
        ) as server,
        client_of(server.address) as client,
    ):
        owner: dict[str, Any] = {"user_id": (await client.create_user(name="Ada")).id}
        messages = [message("user", f"heron {number}") for number in range(10)]
        reply = await client.append_messages(**owner, messages=messages)
        session = {**owner, "session_id": reply.session_id}
        calls: dict[str, Callable[..., Awaitable[Any]]] = {
            "list_sessions": partial(client.list_sessions, **owner),
            "get_context": partial(client.get_context, **session),
            "search_messages": partial(
                client.search_messages,
                **owner,
                query="heron",
                mode=SearchMode.SEARCH_MODE_LEXICAL,
            ),
            "list_documents": partial(client.list_documents, **owner),
            "export_user_data": partial(pull_export, client, **owner),
        }
        for name, call in calls.items():
            before = outcomes(server)
            strong = await call()
            assert await call(read_consistency="strong") == strong
            assert outcomes(server) == before, name
            eventual = await read_from_replica(server, partial(call, read_consistency="eventual"))
            assert eventual == strong, name
        before = outcomes(server)
        listed = await list_all_messages(client, **session, read_consistency="eventual")
        assert [item.seq for item in listed] == list(range(10, 0, -1))
        # All pages but the first.
        assert outcomes(server)["replica"] == before["replica"] + 2


async def test_unknown_read_consistency_is_rejected_before_anything_is_sent(
    client: ChatHistoryClient, owner: str
) -> None:
    with pytest.raises(ValueError, match="read_consistency must be 'strong' or 'eventual'"):
        await client.list_sessions(user_id=owner, read_consistency="weak")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read_consistency"):
        await client.get_context(
            user_id=owner,
            session_id=owner,
            read_consistency="",  # type: ignore[arg-type]
        )
