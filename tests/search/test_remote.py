"""A Qdrant of its own process: transport, outages, deadlines, and that the index equals PostgreSQL whatever happens."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from chathistory.v1 import search_pb2, user_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from qdrant_client import models

from service import doctor
from service.search import indexer, rebuild
from service.search.service import Search
from service.search.types import Point, PointKind, unpack_vector
from service.server import Server
from tests.search.library import (
    HYBRID,
    INDEXED,
    LEXICAL,
    SEMANTIC,
    Library,
)
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
from tests.support.failures import failure_of
from tests.support.servers import channel, connected, serving, status_code
from tests.support.statements import SentStatements

pytestmark = pytest.mark.faults  # Takes long.

FOREIGN = "somebody-elses"


@asynccontextmanager
async def at_work(url: str, remote: dict[str, Any]) -> AsyncGenerator[tuple[Server, Library]]:
    """Give a server with search on, ready, and a new user's library."""
    async with serving(url, **remote) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        yield server, Library(await Chat.of_new_user(stub))


async def expected(url: str, server: Server) -> dict[str, bytes]:
    """Return what PostgreSQL says that the index must hold: the vector of each point, by its id."""
    chunks = await fetch(
        url,
        "SELECT user_id::text, document_id::text, chunk_index::text, left(text, 8192) AS text, vector FROM document_chunks",
    )
    messages = await fetch(
        url,
        "SELECT user_id::text, session_id::text, id::text, left(content, 8192), NULL FROM chat_messages "
        "WHERE deleted_at IS NULL AND btrim(content) <> ''",
    )
    rows = [(Point(r[0], PointKind.CHUNK, r[1], r[2]), r[3], r[4]) for r in chunks]
    rows += [(Point(r[0], PointKind.MESSAGE, r[1], r[2]), r[3], None) for r in messages]
    assert isinstance(server.search, Search)
    assert server.search._embeddings is not None
    made: dict[str, bytes] = {}
    for point, text, vector in rows:
        made[point.id] = vector or await server.search._embeddings.embed([text])
    return made


async def index_equals_postgres(url: str, server: Server, qdrant: QdrantServer) -> None:
    await wait_until_indexed(server)
    (collection,) = await qdrant.live()
    points = await qdrant.points(collection)
    wanted = await expected(url, server)
    assert points.keys() == wanted.keys()
    for id_, (payload, vector) in points.items():
        assert set(payload) == {"user_id", "kind", "entity_id", "item"}, "points carry ids only"
        assert Point(**payload).id == id_
        assert vector == pytest.approx(unpack_vector(wanted[id_]), abs=1e-4)


async def foreign(qdrant: QdrantServer) -> None:
    """Put a collection of somebody else's beside ours."""
    await qdrant.engine.create_collection(
        FOREIGN, vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    await qdrant.engine.upsert(
        FOREIGN,
        [
            models.PointStruct(id=n, vector=[float(n), 1.0], payload={"user_id": "x"})
            for n in range(5)
        ],
    )


async def test_what_is_written_is_found_and_what_is_erased_is_gone(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    await foreign(qdrant)
    async with at_work(database_url, remote) as (server, library):
        await library.create(["Cats purr when content."], title="cats")
        gone = await library.create(["Ships sail on the sea.", "Trains run on rails."])
        await library.chat.start("I saw a dolphin near the harbour")
        other = await library.chat.start("My tax return is late")
        await index_equals_postgres(database_url, server, qdrant)
        assert (await library.search("boats"))[0].document.id == gone.id
        await library.delete(gone.id)
        await library.chat.delete_session(other)
        await index_equals_postgres(database_url, server, qdrant)
        (collection,) = await qdrant.live()
        assert len(await qdrant.points(collection)) == 2
        reply = await library.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=library.user_id))
        assert (
            reply.document_count,
            reply.chunk_count,
            reply.message_count,
            reply.vector_count,
        ) == (1, 1, 1, 2)
        await wait_until_indexed(server)
        assert await qdrant.points(collection) == {}
        assert await fetch(database_url, "SELECT FROM search_outbox") == []
    assert len(await qdrant.points(FOREIGN)) == 5
    tenant = qdrant.indexes[collection, "user_id"]
    assert tenant.keyword_index_params.is_tenant


async def test_every_query_names_its_owners(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with at_work(database_url, remote) as (_server, library):
        await library.search("anything", document_ids=[new_id()])
        await library.search_messages("anything", SEMANTIC)
        assert len(qdrant.queries) == 2
        for query in qdrant.queries:
            owners = [c.field for c in query.filter.must if c.field.key == "user_id"]
            assert library.user_id in owners[0].match.keywords.strings


@pytest.mark.case(n=24)
async def test_an_outage_touches_search_alone_and_everything_is_caught_up(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with at_work(database_url, remote) as (server, library):
        session = await library.chat.start("The keys are under the mat")
        doomed = await library.create(["This will be deleted while nobody can tell the index."])
        await wait_until_indexed(server)
        await qdrant.stop()
        started = time.monotonic()
        for call in (
            library.search("keys"),
            library.search_messages("keys", SEMANTIC),
            library.search_messages("keys", HYBRID),
        ):
            failure = await failure_of(call)
            assert (failure.code, failure.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "SEARCH_UNAVAILABLE",
            )
        assert time.monotonic() - started < 8, "the time-out of one of them at the most"
        async with channel(server.address) as opened:
            health: Any = health_pb2_grpc.HealthStub(opened)
            search = await health.Check(health_pb2.HealthCheckRequest(service="search"))
            ready = await health.Check(health_pb2.HealthCheckRequest())
        assert (search.status, ready.status) == (2, 1)
        await library.chat.append(session, "The spare key is with the neighbour")
        assert [hit.message.seq for hit in await library.search_messages("spare key", LEXICAL)] == [
            2
        ]
        await library.delete(doomed.id)
        late = await library.create(["Written during the outage: the cellar is flooded."])
        assert (await library.get(late.id)).status != INDEXED
        assert isinstance(server.search, Search)
        before = server.search.stats.lag_s
        assert before > 0
        await wait_until(lambda: _lags(server, before + 0.2), "the lag grows")
        await qdrant.start()
        await wait_until_searchable(server)
        await index_equals_postgres(database_url, server, qdrant)
        await wait_until(lambda: _no_lag(server), "the lag is over")
        assert (await library.get(late.id)).status == INDEXED
        assert (await library.search("water damage downstairs"))[0].document.id == late.id


async def _lags(server: Server, seconds: float) -> bool:
    assert isinstance(server.search, Search)
    return server.search.stats.lag_s > seconds


async def _no_lag(server: Server) -> bool:
    assert isinstance(server.search, Search)
    return (server.search.stats.lag_s, server.search.stats.pending) == (0.0, 0)


async def test_an_idle_index_asks_the_database_nothing(
    cluster: Cluster, database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with at_work(database_url, remote) as (server, library):
        await library.create(["found"])
        await wait_until_indexed(server)
        await wait_until(lambda: _no_lag(server), "the indexer has nothing left")
        await asyncio.sleep(0.5)
        sent = SentStatements(cluster, database_url)
        await asyncio.sleep(7)
        assert sent.so_far() == []
        await qdrant.stop()
        assert (await failure_of(library.search("found"))).reason == "SEARCH_UNAVAILABLE"
        sent = SentStatements(cluster, database_url)
        await asyncio.sleep(7)
        assert sent.so_far() == []


async def test_a_qdrant_that_does_not_answer_in_time(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with at_work(database_url, remote) as (_server, library):
        qdrant.delay = 8.0
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await library.search("anything")
        assert status_code(failed.value) == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 7.5
        assert await library.chat.start("chat goes on")
        qdrant.delay = 0.0


async def rebuilt(library: Library) -> list[search_pb2.RebuildSearchIndexResponse]:
    return [
        reply
        async for reply in library.stub.RebuildSearchIndex(search_pb2.RebuildSearchIndexRequest())
    ]


async def test_rebuilding_under_load(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    await foreign(qdrant)
    async with at_work(database_url, remote) as (server, library):
        for n in range(30):
            await library.create([f"Fact {n} about the moon.", f"Fact {n} about the sun."])
        session = await library.chat.start("the moon is bright tonight")
        await wait_until_indexed(server)
        await wait_until_built(server)  # Else it is the first building that is followed.
        (before,) = await qdrant.live()
        done = asyncio.Event()

        async def load() -> int:
            searches = 0
            while not done.is_set():
                assert len(await library.search("what is known about the moon")) == 10
                await library.create([f"Written meanwhile {searches}."])
                await library.chat.append(session, f"said meanwhile {searches}")
                if searches == 3:
                    await library.chat.delete(session, (await library.chat.all(session))[0].id)
                searches += 1
            return searches

        searching = asyncio.create_task(load())
        replies = await rebuilt(library)
        done.set()
        assert await searching >= 1
        assert replies[0].total_count >= 31
        (after,) = await qdrant.live()
        assert after != before
        await index_equals_postgres(database_url, server, qdrant)
        names = [each.name for each in (await qdrant.engine.get_collections()).collections]
        assert sorted(names) == sorted([after, FOREIGN])
    assert len(await qdrant.points(FOREIGN)) == 5


async def test_the_statements_that_do_without_an_owner_are_the_named_ones(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    all_new_statements()
    async with at_work(database_url, remote) as (server, library):
        await library.create(["x"])
        await library.chat.start("y")
        await wait_until_indexed(server)
        await rebuilt(library)
        await doctor.describe(server.database.target, 20.0)
    seen = all_new_statements()
    assert sentinel.complaints(seen) == []
    flat = {" ".join(statement.sql.split()).rstrip("; ") for statement in seen}
    ours = [
        name
        for name, pattern in sentinel.NAMED.items()
        if "search_" in pattern or "slice" in pattern
    ]
    assert len(ours) == 7
    for name in ours:
        assert any(re.fullmatch(sentinel.NAMED[name], sql) for sql in flat), (
            f"{name}: no statement is it any more"
        )


async def test_a_lost_index_is_built_again_at_the_next_start(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with at_work(database_url, remote) as (server, library):
        made = await library.create(["Nothing is lost that PostgreSQL has."])
        await wait_until_indexed(server)
    for name in [each.name for each in (await qdrant.engine.get_collections()).collections]:
        await qdrant.engine.delete_collection(name)
    await qdrant.engine.update_collection_aliases(
        [
            models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=each.alias_name))
            for each in (await qdrant.engine.get_aliases()).aliases
        ]
    )
    async with serving(database_url, **remote) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        await wait_until(
            lambda: _found(Library(Chat(stub, library.user_id)), made.id), "it is found again"
        )
        await index_equals_postgres(database_url, server, qdrant)


async def _found(library: Library, document_id: str) -> bool:
    return any(hit.document.id == document_id for hit in await library.search("lost"))


async def test_two_replicas_share_the_work(
    database_url: str, qdrant: QdrantServer, remote: dict[str, Any]
) -> None:
    async with (
        at_work(database_url, remote) as (one, library),
        at_work(database_url, remote) as (two, more),
    ):
        made = [
            each.create([f"{n} of many facts", "and another"])
            for n in range(20)
            for each in (library, more)
        ]
        await asyncio.gather(*made)
        await index_equals_postgres(database_url, one, qdrant)
        await wait_until_indexed(two)
        assert isinstance(one.search, Search)
        assert isinstance(two.search, Search)
        count = 80

        def done() -> list[int]:
            return [server.search.stats.indexed for server in (one, two)]

        while not all(
            done()
        ):  # Who comes first may have taken everything; both take their part before long.
            await asyncio.gather(*(each.create(["one more"]) for each in (library, more)))
            await wait_until_indexed(one)
            count += 2
        assert sum(done()) == len(qdrant.upserted) == len(set(qdrant.upserted)) == count, (
            "each is done once"
        )


STEPS = st.lists(
    st.sampled_from(
        [
            "create",
            "grow",
            "delete",
            "say",
            "edit",
            "unsay",
            "forget",
            "leave",
            "crash",
            "outage",
            "back",
            "rebuild",
        ]
    ),
    min_size=3,
    max_size=14,
)


@pytest.mark.case(n=24)
@pytest.mark.timeout(300)
async def test_the_index_equals_postgres_whatever_happens(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any sequence of writes, crashes and outages ends, when all is back, with an index that holds what PostgreSQL holds."""
    # What a crash leaves leased is taken again soon.
    monkeypatch.setattr(indexer, "LEASE_S", 2.0)
    monkeypatch.setattr(indexer, "LEASE_MARGIN_S", 1.2)
    monkeypatch.setattr(indexer, "RECHECK_S", 0.2)
    monkeypatch.setattr(rebuild, "LEASE_S", 2.0)

    async def run(steps: Sequence[str]) -> None:
        name = await cluster.create_database()
        qdrant = QdrantServer()
        await qdrant.start()
        given_ = {
            "search": "on",
            "QDRANT_URL": qdrant.url,
            "qdrant_grpc_port": qdrant.port,
            "search_timeout": 3.0,
        }
        try:
            await _play(cluster.url(name), qdrant, given_, steps)
        finally:
            await qdrant.stop()
            await qdrant.engine.close()
            await cluster.drop_database(name)

    loop = asyncio.get_running_loop()

    @settings(max_examples=12)
    @given(STEPS)
    def whatever(steps: list[str]) -> None:
        asyncio.run_coroutine_threadsafe(run(steps), loop).result(120)

    await asyncio.to_thread(whatever)


async def _play(
    url: str, qdrant: QdrantServer, remote: dict[str, Any], steps: Sequence[str]
) -> None:
    pending = list(steps)
    people: list[str] = []
    while True:
        async with serving(url, **remote) as server, connected(server.address) as stub:
            if not people:
                people.append((await Chat.of_new_user(stub)).user_id)
            crashed = await _live(server, Library(Chat(stub, people[0])), qdrant, pending, people)
            if not crashed:
                await qdrant.stop()
                await qdrant.start()
                await wait_until_searchable(server)
                await index_equals_postgres(url, server, qdrant)
                return


async def _live(  # noqa: C901, PLR0912 - a table of steps
    server: Server, library: Library, qdrant: QdrantServer, pending: list[str], people: list[str]
) -> bool:
    """Take the steps until one is a crash: then the index knows nothing of what was just written."""
    documents = [document.id for document in await library.list_all()]
    sessions = [session.id for session in (await library.chat.list_sessions()).sessions]
    while pending:
        step = pending.pop(0)
        match step:
            case "create":
                documents.append((await library.create([f"text {len(documents)}", "more"])).id)
            case "grow" if documents:
                there = (await library.get(documents[-1])).chunk_count
                await library.append(documents[-1], there, [f"grown {there}"])
            case "delete" if documents:
                await library.delete(documents.pop(0))
            case "say":
                sessions.append(await library.chat.start(f"said {len(sessions)}"))
            case "edit" if sessions:
                for message in (await library.chat.page(sessions[-1])).messages:
                    await library.chat.update(
                        sessions[-1], message.id, content=f"edited {len(pending)}"
                    )
            case "unsay" if sessions:
                for message in (await library.chat.page(sessions[0])).messages:
                    await library.chat.delete(sessions[0], message.id)
            case "forget" if sessions:
                await library.chat.delete_session(sessions.pop(0))
            case "leave":
                await library.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=library.user_id))
                made = user_pb2.User(id=library.user_id)
                await library.stub.CreateUser(user_pb2.CreateUserRequest(user=made))
                documents, sessions = [], []
            case "crash":
                # Killed in mid-air: nothing is finished, given back or closed in order.
                assert isinstance(server.search, Search)
                if server.search._indexer is not None:
                    server.search._indexer._release_batch = _nothing  # type: ignore[method-assign, assignment]
                return True
            case "outage":
                await qdrant.stop()
            case "back":
                await qdrant.stop()
                await qdrant.start()
            case "rebuild" if server.search.is_healthy:
                with_errors = asyncio.create_task(rebuilt(library))
                await asyncio.wait([with_errors], timeout=0.2)
                with_errors.cancel()
                await asyncio.wait([with_errors])
    assert people
    return False


async def _nothing(*_: object) -> None:
    pass
