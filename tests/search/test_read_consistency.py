"""Searches that may lag read the texts of their hits from the replica."""

from __future__ import annotations

from pathlib import Path

from chathistory.v1 import message_pb2

from tests.search.library import Library
from tests.search.waits import wait_until_indexed, wait_until_searchable
from tests.support.chat import Chat, new_message
from tests.support.lagging import eventual, outcomes, read_from_replica
from tests.support.route import routed_url
from tests.support.servers import connected, serving

HYBRID = message_pb2.SEARCH_MODE_HYBRID


async def test_hits_are_read_from_the_replica(database_url: str, tmp_path: Path) -> None:
    async with (
        serving(
            database_url,
            DATABASE_READ_URL=routed_url(database_url),
            read_max_lag=60,
            search="on",
            data_dir=tmp_path,
        ) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        chat, other = await Chat.of_new_user(stub), await Chat.of_new_user(stub)
        await Library(chat).create(["A heron is a wading bird."], title="Herons")
        await chat.start([new_message("Do herons wade?")])
        await wait_until_indexed(server)

        strong, lagging = Library(chat), Library(eventual(chat))
        assert outcomes(server)["replica"] == 0
        hits = await read_from_replica(server, lambda: lagging.search("wading bird"))
        assert hits
        assert hits == await strong.search("wading bird")
        assert not await Library(eventual(other)).search("wading bird")

        messages = await read_from_replica(
            server, lambda: lagging.search_messages("herons", HYBRID)
        )
        assert messages == await strong.search_messages("herons", HYBRID)
        assert [hit.message.content for hit in messages] == ["Do herons wade?"]
        assert outcomes(server)["failed"] == 0
