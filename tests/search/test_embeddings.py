"""Embeddings by an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import document_pb2
from grpc.aio import AioRpcError

from service.search import indexer
from service.search.embeddings import RemoteEmbeddings
from service.search.query_queue import REMOTE_LIMITS
from service.search.service import Search
from service.search.types import (
    InputRejected,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    unpack_vector,
)
from tests.search.embeddings_endpoint import EmbeddingsEndpoint
from tests.search.index_check import searchable
from tests.search.library import INDEXED, SEMANTIC, Library
from tests.search.waits import wait_until, wait_until_indexed, wait_until_searchable
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.failures import assert_fails, assert_field_violations, read_failure
from tests.support.servers import connected, serving

FAILED = document_pb2.DOCUMENT_STATUS_FAILED


@pytest.fixture
async def endpoint() -> AsyncGenerator[EmbeddingsEndpoint]:
    """Yield an endpoint."""
    endpoint = EmbeddingsEndpoint()
    await endpoint.start()
    yield endpoint
    await endpoint.stop()


@pytest.fixture
def remote_embeddings(endpoint: EmbeddingsEndpoint, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a service that uses the endpoint."""
    return {
        "search": "on",
        "data_dir": tmp_path,
        "EMBEDDINGS_URL": endpoint.url,
        "EMBEDDINGS_MODEL": "Tiny/Model v1",
    }


async def wait_for_status(
    library: Library, document_id: str, status: document_pb2.DocumentStatus.ValueType
) -> None:
    async def has_status() -> bool:
        return (await library.get(document_id)).status == status

    await wait_until(has_status, f"the document has status {status}")


async def message_texts(library: Library, query: str) -> set[str]:
    hits = await library.search_messages(query, SEMANTIC)
    return {hit.message.content for hit in hits}


async def test_vectors_are_in_the_order_of_the_texts(endpoint: EmbeddingsEndpoint) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", "key-of-mine", None, 2.0)
    assert await embeddings.dimensions() == 4
    both, second = await embeddings.embed(["a", "b"]), await embeddings.embed(["b"])
    assert unpack_vector(both)[4:] == unpack_vector(second)
    head, request = endpoint.requests[-1]
    assert "authorization: bearer key-of-mine" in head.lower()
    assert request["model"] == "tiny"
    await embeddings.close()


async def test_each_failure_of_the_endpoint_raises_its_error(endpoint: EmbeddingsEndpoint) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", None, 5, 2.0)
    with pytest.raises(SearchMisconfigured, match="EMBEDDINGS_DIMENSIONS is 5"):
        await embeddings.dimensions()
    for status, error in (
        (400, InputRejected),
        (401, SearchUnavailable),
        (429, SearchOverloaded),
        (500, SearchUnavailable),
    ):
        endpoint.status = status
        with pytest.raises(error):
            await embeddings.embed(["a"])
    await embeddings.close()
    unreachable = RemoteEmbeddings("http://127.0.0.1:1/v1", "tiny", None, None, 2.0)
    with pytest.raises(SearchUnavailable):
        await unreachable.embed(["a"])
    await unreachable.close()


@pytest.mark.parametrize("status", [403, 404, 500, 503])
async def test_text_that_the_endpoint_fails_for_is_rejected_and_not_the_others(
    endpoint: EmbeddingsEndpoint, status: int
) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", None, None, 2.0)
    endpoint.rejected_text, endpoint.rejected_status = "poison", status
    for texts in (["poison"], ["good", "poison"]):
        with pytest.raises(InputRejected, match=f"HTTP {status}"):
            await embeddings.embed(texts)
    assert len(await embeddings.embed(["good"])) == 16
    endpoint.status = status
    with pytest.raises(SearchUnavailable):
        await embeddings.embed(["good"])
    await embeddings.close()


async def test_large_batches_are_sent_in_parts(endpoint: EmbeddingsEndpoint) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", None, None, 2.0)
    texts = [f"text {n}" for n in range(70)] + ["x" * 8192] * 40
    vectors = await embeddings.embed(texts)
    sent = [request["input"] for _, request in endpoint.requests]
    assert [text for part in sent for text in part] == texts
    assert max(map(len, sent)) == 32
    assert max(sum(map(len, part)) for part in sent) <= 131_072
    assert len(vectors) == 16 * len(texts)
    await embeddings.close()


async def test_endpoint_that_rejects_every_text_is_unavailable(
    endpoint: EmbeddingsEndpoint,
) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", None, None, 2.0)
    endpoint.status = 400
    with pytest.raises(SearchUnavailable, match="HTTP 400"):
        await embeddings.dimensions()
    await embeddings.close()


async def test_text_with_a_malformed_vector_is_rejected_and_not_the_others(
    endpoint: EmbeddingsEndpoint,
) -> None:
    embeddings = RemoteEmbeddings(endpoint.url, "tiny", None, None, 2.0)
    endpoint.malformed_text = "poison"
    for texts in (["poison"], ["good", "poison"]):
        with pytest.raises(InputRejected):
            await embeddings.embed(texts)
    assert len(await embeddings.embed(["good"])) == 16
    endpoint.malformed_text = ""
    with pytest.raises(SearchUnavailable):
        await embeddings.embed(["good"])
    await embeddings.close()


async def test_query_that_the_endpoint_fails_for_leaves_search_healthy(
    database_url: str, endpoint: EmbeddingsEndpoint, remote_embeddings: dict[str, Any]
) -> None:
    endpoint.rejected_text, endpoint.rejected_status = "poison", 500
    async with searchable(database_url, remote_embeddings) as (server, library):
        changes: list[bool] = []
        server.search.on_change = lambda: changes.append(server.search.is_healthy)
        document = await library.create(["some text"])
        rejected = await library.create(["other text", "poison"])
        await wait_for_status(library, document.id, INDEXED)
        await assert_field_violations(library.search("poison"), "query")
        hit = (await library.search("some text"))[0]
        assert hit.document.id == document.id

        async def is_rest_indexed() -> bool:
            return (await library.search("other text"))[0].document.id == rejected.id

        await wait_until(is_rest_indexed, "the other chunk is indexed")
        assert changes == []


async def test_slow_endpoint_receives_a_bounded_number_of_queries_of_each_user(
    database_url: str, endpoint: EmbeddingsEndpoint, remote_embeddings: dict[str, Any]
) -> None:
    async with searchable(database_url, remote_embeddings) as (server, library):
        others = Library(await Chat.of_new_user(library.stub))
        await others.create(["some text"])
        await wait_until_indexed(server)
        endpoint.delay_s, endpoint.max_in_flight = 0.3, 0
        flood = [asyncio.create_task(library.search("flood")) for _ in range(100)]
        while not endpoint.max_in_flight:
            await asyncio.sleep(0.01)
        assert len(await others.search("some text")) == 1
        results = await asyncio.gather(*flood, return_exceptions=True)
        rejections = [result for result in results if isinstance(result, AioRpcError)]
        assert {read_failure(error).reason for error in rejections} == {"OVERLOADED"}
        limits = REMOTE_LIMITS
        assert len(flood) - len(rejections) >= limits.max_waiting_per_user
        assert endpoint.max_in_flight <= limits.max_running_per_user + 1
        assert server.search.is_healthy


async def test_service_searches_by_the_endpoints_vectors(
    database_url: str, endpoint: EmbeddingsEndpoint, remote_embeddings: dict[str, Any]
) -> None:
    async with searchable(database_url, remote_embeddings) as (server, library):
        document = await library.create(["some text", "other text"])
        await wait_until_indexed(server)
        hit = (await library.search("other text"))[0]
        assert (hit.document.id, hit.chunk_index) == (document.id, 1)
        assert hit.score == pytest.approx(1.0), "the cosine, without reranking"
        assert isinstance(server.search, Search)
        assert server.search._alias == "chathistory_tiny-model-v1_4"
        endpoint.status = 503
        late = await library.create(["late text"])
        await asyncio.sleep(0.3)
        endpoint.status = 200
        await wait_for_status(library, late.id, INDEXED)


@pytest.mark.faults
async def test_rejected_text_fails_alone_and_is_retried_at_the_next_start(
    database_url: str,
    endpoint: EmbeddingsEndpoint,
    remote_embeddings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexer, "RETRY_BASE_S", 0.01)
    endpoint.rejected_text = "poison"
    async with searchable(database_url, remote_embeddings) as (server, library):
        rejected = await library.create([f"text {n}" if n != 70 else "poison" for n in range(100)])
        valid = await library.create(["nothing is wrong with this one"])
        session = await library.chat.start("before")
        for text in ("poison", "after"):
            await library.chat.append(session, text)
        await wait_for_status(library, rejected.id, FAILED)
        await wait_until_indexed(server)
        assert "refuses" in (await library.get(rejected.id)).status_detail
        failed = (await library.list_page(status=FAILED)).documents
        assert [document.id for document in failed] == [rejected.id]
        assert (await library.get(valid.id)).status == INDEXED
        hits = await library.search("text 99", document_ids=[rejected.id], limit=100)
        assert {hit.chunk_index for hit in hits} == set(range(100)) - {70}
        assert await message_texts(library, "after") == {"before", "after"}
        search = server.search
        assert search.is_healthy

        async def has_two_dead_letters() -> bool:
            return (search.stats.failed, search.stats.lag_s) == (2, 0.0)

        await wait_until(has_two_dead_letters, "document and session are dead letters")
        # A new message is embedded without the earlier ones of its session.
        request_count = len(endpoint.requests)
        await library.chat.append(session, "later")
        await wait_until_indexed(server)
        requests = [request["input"] for _, request in endpoint.requests[request_count:]]
        assert requests == [["later"]]
        assert "later" in await message_texts(library, "later")
    endpoint.rejected_text = "\0"
    async with (
        serving(database_url, **remote_embeddings) as server,
        connected(server.address) as stub,
    ):
        await wait_until_searchable(server)
        await wait_for_status(Library(Chat(stub, library.user_id)), rejected.id, INDEXED)
        await wait_until_indexed(server)
        assert await fetch(database_url, "SELECT FROM search_outbox") == []


@pytest.mark.faults
async def test_overloaded_endpoint_is_retried_with_back_off_and_stays_healthy(
    database_url: str, endpoint: EmbeddingsEndpoint, remote_embeddings: dict[str, Any]
) -> None:
    async with searchable(database_url, remote_embeddings) as (server, library):
        endpoint.status = 429
        request_count = len(endpoint.requests)
        document = await library.create(["some text"])
        await assert_fails(library.search("anything"), "SEARCH_UNAVAILABLE")
        await asyncio.sleep(2.0)
        assert server.search.is_healthy
        assert 2 <= len(endpoint.requests) - request_count <= 6
        assert server.search.stats.lag_s > 1.0
        endpoint.status = 200
        await wait_for_status(library, document.id, INDEXED)
