"""Embeddings by an OpenAI-compatible endpoint: a local stand-in that answers what the client sends."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from chathistory.v1 import document_pb2
from grpc import StatusCode

from service.search import indexer
from service.search.embeddings import RemoteEmbeddings
from service.search.service import Search
from service.search.types import (
    InputRejected,
    SearchMisconfigured,
    SearchUnavailable,
    unpack_vector,
)
from tests.search.library import INDEXED, SEMANTIC, Library
from tests.search.waits import wait_until, wait_until_indexed, wait_until_searchable
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.failures import failure_of
from tests.support.servers import connected, serving


class Endpoint:
    """`POST /v1/embeddings`: a vector of four numbers made of each text's hash."""

    def __init__(self) -> None:
        self.status = 200
        self.refused = "\0"
        """Any request with this in a text is answered 400."""
        self.seen: list[tuple[str, dict[str, object]]] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1])
            for line in head.lower().splitlines()
            if line.startswith("content-length")
        )
        sent = json.loads(await reader.readexactly(length))
        self.seen.append((head, sent))
        status = 400 if any(self.refused in text for text in sent["input"]) else self.status
        data = [
            {
                "object": "embedding",
                "index": n,
                "embedding": [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:4]],
            }
            for n, text in enumerate(sent["input"])
        ]
        # In another order than asked: the index says which is which.
        reply = {
            "object": "list",
            "data": data[::-1],
            "model": sent["model"],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }
        body = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def endpoint() -> AsyncGenerator[Endpoint]:
    """Give an endpoint."""
    served = Endpoint()
    server = await asyncio.start_server(served.answer, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield served
    server.close()
    await server.wait_closed()


async def test_vectors_come_back_in_order(endpoint: Endpoint) -> None:
    made = RemoteEmbeddings(endpoint.url, "tiny", "key-of-mine", None, 2.0)
    assert await made.dimensions() == 4
    both, one = await made.embed(["a", "b"]), await made.embed(["b"])
    assert unpack_vector(both)[4:] == unpack_vector(one)
    head, sent = endpoint.seen[-1]
    assert "authorization: bearer key-of-mine" in head.lower()
    assert sent["model"] == "tiny"
    await made.close()


async def test_what_goes_wrong_is_told_apart(endpoint: Endpoint) -> None:
    made = RemoteEmbeddings(endpoint.url, "tiny", None, 5, 2.0)
    with pytest.raises(SearchMisconfigured, match="EMBEDDINGS_DIMENSIONS is 5"):
        await made.dimensions()
    for status, kind in (
        (400, InputRejected),
        (401, SearchUnavailable),
        (429, SearchUnavailable),
        (500, SearchUnavailable),
    ):
        endpoint.status = status
        with pytest.raises(kind):
            await made.embed(["a"])
    await made.close()
    nobody = RemoteEmbeddings("http://127.0.0.1:1/v1", "tiny", None, None, 2.0)
    with pytest.raises(SearchUnavailable):
        await nobody.embed(["a"])
    await nobody.close()


async def test_the_service_uses_it(database_url: str, tmp_path: Path, endpoint: Endpoint) -> None:
    given = {
        "search": "on",
        "data_dir": tmp_path,
        "EMBEDDINGS_URL": endpoint.url,
        "EMBEDDINGS_MODEL": "Tiny/Model v1",
    }
    async with serving(database_url, **given) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        library = Library(await Chat.of_new_user(stub))
        made = await library.create(["some text", "other text"])
        await wait_until_indexed(server)
        hit = (await library.search("other text"))[0]
        assert (hit.document.id, hit.chunk_index) == (made.id, 1)
        assert hit.score == pytest.approx(1.0), "its vectors decide, and nothing else"
        assert isinstance(server.search, Search)
        assert server.search._alias == "chathistory_tiny-model-v1_4"
        endpoint.status = 503
        late = await library.create(["late text"])
        await asyncio.sleep(0.3)
        endpoint.status = 200

        async def indexed() -> bool:
            return (await library.get(late.id)).status == INDEXED

        await wait_until(indexed, "it is caught up")


async def test_one_text_that_is_refused_holds_no_other_up(
    database_url: str, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "RETRY_BASE_S", 0.01)
    endpoint.refused = "poison"
    given = {
        "search": "on",
        "data_dir": tmp_path,
        "EMBEDDINGS_URL": endpoint.url,
        "EMBEDDINGS_MODEL": "tiny",
    }
    async with serving(database_url, **given) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        library = Library(await Chat.of_new_user(stub))
        made = await library.create([f"text {n}" if n != 70 else "poison" for n in range(100)])
        fine = await library.create(["nothing is wrong with this one"])
        session = await library.chat.start("before")
        for text in ("poison", "after"):
            await library.chat.append(session, text)

        async def given_up() -> bool:
            return (await library.get(made.id)).status == document_pb2.DOCUMENT_STATUS_FAILED

        await wait_until(given_up, "the document is given up")
        await wait_until_indexed(server)
        document = await library.get(made.id)
        assert "refuses" in document.status_detail
        assert [
            each.id for each in (await library.list_page(status=document.status)).documents
        ] == [made.id]
        assert (await library.get(fine.id)).status == INDEXED
        found = {
            hit.chunk_index
            for hit in await library.search("text 99", document_ids=[made.id], limit=100)
        }
        assert found == set(range(100)) - {70}
        assert {
            hit.message.content for hit in await library.search_messages("after", SEMANTIC)
        } == {
            "before",
            "after",
        }
        search = server.search
        assert isinstance(search, Search)
        assert search.is_healthy

        async def told() -> bool:
            return (search.stats.failed, search.stats.lag_s) == (2, 0.0)

        await wait_until(told, "the figures say so")
        # What comes later is indexed without asking for the rest again.
        asked = len(endpoint.seen)
        await library.chat.append(session, "later")
        await wait_until_indexed(server)
        assert [sent["input"] for _, sent in endpoint.seen[asked:]] == [["later"]]
        assert "later" in {
            hit.message.content for hit in await library.search_messages("later", SEMANTIC)
        }
    endpoint.refused = "\0"
    async with serving(database_url, **given) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        library = Library(Chat(stub, library.user_id))

        async def indexed() -> bool:
            return (await library.get(made.id)).status == INDEXED

        await wait_until(indexed, "the next start tries it again")
        await wait_until_indexed(server)
        assert await fetch(database_url, "SELECT FROM search_outbox") == []


async def test_an_endpoint_that_takes_no_more_now_is_not_down(
    database_url: str, tmp_path: Path, endpoint: Endpoint
) -> None:
    given = {
        "search": "on",
        "data_dir": tmp_path,
        "EMBEDDINGS_URL": endpoint.url,
        "EMBEDDINGS_MODEL": "tiny",
    }
    async with serving(database_url, **given) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        library = Library(await Chat.of_new_user(stub))
        endpoint.status = 429
        asked = len(endpoint.seen)
        made = await library.create(["some text"])
        failed = await failure_of(library.search("anything"))
        assert (failed.code, failed.reason) == (StatusCode.UNAVAILABLE, "SEARCH_UNAVAILABLE")
        await asyncio.sleep(2.0)
        assert isinstance(server.search, Search)
        assert server.search.is_healthy
        assert 2 <= len(endpoint.seen) - asked <= 6, "asked again, and more and more seldom"
        assert server.search.stats.lag_s > 1.0
        endpoint.status = 200

        async def indexed() -> bool:
            return (await library.get(made.id)).status == INDEXED

        await wait_until(indexed, "it is caught up")
