"""Search on a Qdrant server: indexing, outages, timeouts, rebuilds and several replicas."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest
from chathistory.v1 import search_pb2, user_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from qdrant_client import models

from service import doctor
from service.server import Server
from service.store.outbox.outbox import Outbox
from tests.search.index_check import assert_index_equals_postgres, searchable
from tests.search.library import HYBRID, INDEXED, LEXICAL, SEMANTIC, Library
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import (
    wait_until,
    wait_until_built,
    wait_until_indexed,
    wait_until_searchable,
)
from tests.support import sentinel
from tests.support.chat import Chat, new_id
from tests.support.cluster import Cluster, all_new_statements, fetch
from tests.support.failures import assert_fails
from tests.support.servers import channel, connected, serving
from tests.support.statements import SentStatements

pytestmark = pytest.mark.faults  # Slow.

FOREIGN = "of-another-application"
"""A collection that the service must not touch."""


async def create_foreign_collection(qdrant: QdrantServer) -> None:
    await qdrant.engine.create_collection(
        FOREIGN, vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    points = [
        models.PointStruct(id=n, vector=[float(n), 1.0], payload={"user_id": "x"}) for n in range(5)
    ]
    await qdrant.engine.upsert(FOREIGN, points)


async def rebuild(library: Library) -> list[search_pb2.RebuildSearchIndexResponse]:
    request = search_pb2.RebuildSearchIndexRequest()
    return [reply async for reply in library.stub.RebuildSearchIndex(request)]


async def wait_until_lag_is_over(server: Server) -> None:
    async def is_over() -> bool:
        return (server.search.stats.lag_s, server.search.stats.pending) == (0.0, 0)

    await wait_until(is_over, "the lag is over")


async def test_index_follows_creates_and_deletes(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    await create_foreign_collection(qdrant)
    async with searchable(database_url, remote) as (server, library):
        await library.create(["Cats purr when content."], title="cats")
        deleted = await library.create(["Ships sail on the sea.", "Trains run on rails."])
        await library.chat.start("I saw a dolphin near the harbour")
        deleted_session = await library.chat.start("My tax return is late")
        await assert_index_equals_postgres(database_url, server, qdrant)
        assert (await library.search("boats"))[0].document.id == deleted.id
        await library.delete(deleted.id)
        await library.chat.delete_session(deleted_session)
        await assert_index_equals_postgres(database_url, server, qdrant)
        (collection,) = await qdrant.live_collections()
        assert len(await qdrant.points(collection)) == 2
        reply = await library.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=library.user_id))
        assert (reply.document_count, reply.chunk_count) == (1, 1)
        assert (reply.message_count, reply.vector_count) == (1, 2)
        await wait_until_indexed(server)
        assert await qdrant.points(collection) == {}
        assert await fetch(database_url, "SELECT FROM search_outbox") == []
    assert len(await qdrant.points(FOREIGN)) == 5
    tenant_index = qdrant.indexes[collection, "user_id"]
    assert tenant_index.keyword_index_params.is_tenant


async def test_every_query_is_restricted_to_owners(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with searchable(database_url, remote) as (_server, library):
        await library.search("anything", document_ids=[new_id()])
        await library.search_messages("anything", SEMANTIC)
        assert len(qdrant.queries) == 2
        for query in qdrant.queries:
            owners = [c.field for c in query.filter.must if c.field.key == "user_id"]
            assert library.user_id in owners[0].match.keywords.strings


@pytest.mark.case(n=24)
async def test_outage_affects_search_only_and_all_changes_are_indexed_afterwards(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with searchable(database_url, remote) as (server, library):
        session = await library.chat.start("The keys are under the mat")
        deleted = await library.create(["This is deleted during the outage."])
        await wait_until_indexed(server)
        await qdrant.stop()
        started = time.monotonic()
        await assert_fails(library.search("keys"), "SEARCH_UNAVAILABLE")
        for mode in (SEMANTIC, HYBRID):
            await assert_fails(library.search_messages("keys", mode), "SEARCH_UNAVAILABLE")
        assert time.monotonic() - started < 8, "only the first call may wait for its timeout"
        async with channel(server.address) as opened:
            health: Any = health_pb2_grpc.HealthStub(opened)
            search = await health.Check(health_pb2.HealthCheckRequest(service="search"))
            service = await health.Check(health_pb2.HealthCheckRequest())
        assert search.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert service.status == health_pb2.HealthCheckResponse.SERVING
        await library.chat.append(session, "The spare key is with the neighbour")
        hits = await library.search_messages("spare key", LEXICAL)
        assert [hit.message.seq for hit in hits] == [2]
        await library.delete(deleted.id)
        late = await library.create(["Written during the outage: the cellar is flooded."])
        assert (await library.get(late.id)).status != INDEXED
        lag_s = server.search.stats.lag_s
        assert lag_s > 0

        async def is_lag_growing() -> bool:
            return server.search.stats.lag_s > lag_s + 0.2

        await wait_until(is_lag_growing, "the lag grows")
        await qdrant.start()
        await wait_until_searchable(server)
        await assert_index_equals_postgres(database_url, server, qdrant)
        await wait_until_lag_is_over(server)
        assert (await library.get(late.id)).status == INDEXED
        assert (await library.search("water damage downstairs"))[0].document.id == late.id


async def test_idle_service_sends_no_statement_with_and_without_qdrant(
    cluster: Cluster, database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with searchable(database_url, remote) as (server, library):
        await library.create(["some text"])
        await wait_until_indexed(server)
        await wait_until_lag_is_over(server)
        await asyncio.sleep(0.5)
        sent = SentStatements(cluster, database_url)
        await asyncio.sleep(7)
        assert sent.so_far() == []
        await qdrant.stop()
        await assert_fails(library.search("text"), "SEARCH_UNAVAILABLE")
        sent = SentStatements(cluster, database_url)
        await asyncio.sleep(7)
        assert sent.so_far() == []


async def test_slow_qdrant_makes_search_unavailable_within_its_timeout(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with searchable(database_url, remote) as (_server, library):
        qdrant.delay_s = 8.0
        started = time.monotonic()
        await assert_fails(library.search("anything"), "SEARCH_UNAVAILABLE")
        assert time.monotonic() - started < 7.5
        assert await library.chat.start("chat goes on")
        qdrant.delay_s = 0.0


async def test_rebuild_under_load_replaces_the_collection_without_a_gap(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    await create_foreign_collection(qdrant)
    async with searchable(database_url, remote) as (server, library):
        for n in range(30):
            await library.create([f"Fact {n} about the moon.", f"Fact {n} about the sun."])
        session = await library.chat.start("the moon is bright tonight")
        await wait_until_indexed(server)
        # Otherwise the RPC would follow the first build.
        await wait_until_built(server)
        (before,) = await qdrant.live_collections()
        is_rebuilt = asyncio.Event()

        async def load() -> int:
            searches = 0
            while not is_rebuilt.is_set():
                assert len(await library.search("what is known about the moon")) == 10
                await library.create([f"Written during the rebuild: {searches}."])
                await library.chat.append(session, f"sent during the rebuild: {searches}")
                if searches == 3:
                    await library.chat.delete(session, (await library.chat.all(session))[0].id)
                searches += 1
            return searches

        loading = asyncio.create_task(load())
        replies = await rebuild(library)
        is_rebuilt.set()
        assert await loading >= 1
        assert replies[0].total_count >= 31
        (after,) = await qdrant.live_collections()
        assert after != before
        await assert_index_equals_postgres(database_url, server, qdrant)
        assert sorted(await qdrant.collections()) == sorted([after, FOREIGN])
    assert len(await qdrant.points(FOREIGN)) == 5


async def test_statements_without_an_owner_are_the_named_ones(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    all_new_statements()
    async with searchable(database_url, remote) as (server, library):
        await library.create(["x"])
        await library.chat.start("y")
        await wait_until_indexed(server)
        await rebuild(library)
        await doctor.describe(server.database.target, 20.0)
        await Outbox(server.database).date_again()
    statements = all_new_statements()
    assert sentinel.complaints(statements) == []
    sent = {" ".join(statement.sql.split()).rstrip("; ") for statement in statements}
    names_of_search = [
        name
        for name, pattern in sentinel.NAMED.items()
        if "search_" in pattern or "slice" in pattern
    ]
    assert len(names_of_search) == 8
    for name in names_of_search:
        assert any(re.fullmatch(sentinel.NAMED[name], sql) for sql in sent), (
            f"{name}: no statement matches its pattern any more"
        )


async def test_lost_index_is_rebuilt_at_the_next_start(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with searchable(database_url, remote) as (server, library):
        document = await library.create(["The index can be lost without losing this text."])
        await wait_until_indexed(server)
    for name in await qdrant.collections():
        await qdrant.engine.delete_collection(name)
    aliases = (await qdrant.engine.get_aliases()).aliases
    await qdrant.engine.update_collection_aliases(
        [
            models.DeleteAliasOperation(
                delete_alias=models.DeleteAlias(alias_name=alias.alias_name)
            )
            for alias in aliases
        ]
    )
    async with serving(database_url, **remote) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        library = Library(Chat(stub, library.user_id))

        async def is_found() -> bool:
            return any(hit.document.id == document.id for hit in await library.search("lost"))

        await wait_until(is_found, "the index is rebuilt")
        await assert_index_equals_postgres(database_url, server, qdrant)


async def test_two_replicas_share_the_work_and_repeat_none(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with (
        searchable(database_url, remote) as (server1, library1),
        searchable(database_url, remote) as (server2, library2),
    ):
        libraries = (library1, library2)
        await asyncio.gather(
            *(
                library.create([f"{n} of many facts", "and another"])
                for n in range(20)
                for library in libraries
            )
        )
        await assert_index_equals_postgres(database_url, server1, qdrant)
        await wait_until_indexed(server2)
        count = 80

        def indexed_counts() -> list[int]:
            return [server.search.stats.indexed for server in (server1, server2)]

        # The first server may have claimed all rows; with more work both get some.
        while not all(indexed_counts()):
            await asyncio.gather(*(library.create(["one more"]) for library in libraries))
            await wait_until_indexed(server1)
            count += 2
        assert sum(indexed_counts()) == count
        assert len(qdrant.upserted) == len(set(qdrant.upserted)) == count
