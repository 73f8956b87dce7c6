"""Embeddings by an OpenAI-compatible endpoint: a local stand-in that answers what the client sends."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from service.search.embeddings import RemoteEmbeddings
from service.search.index import floats
from service.search.points import Refused, SearchDown, WrongIndex
from tests.search.library import INDEXED, Library, comes_true, searchable, settled
from tests.support.chat import Chat
from tests.support.servers import connected, serving


class Endpoint:
    """`POST /v1/embeddings`: a vector of four numbers made of each text's hash."""

    def __init__(self) -> None:
        self.status = 200
        self.seen: list[tuple[str, dict[str, object]]] = []
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1]) for line in head.lower().splitlines() if line.startswith("content-length")
        )
        sent = json.loads(await reader.readexactly(length))
        self.seen.append((head, sent))
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
        body = json.dumps(reply if self.status == 200 else {"error": {"message": "no"}}).encode()
        writer.write(
            f"HTTP/1.1 {self.status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
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
    assert floats(both)[4:] == floats(one)
    head, sent = endpoint.seen[-1]
    assert "authorization: bearer key-of-mine" in head.lower()
    assert sent["model"] == "tiny"
    await made.close()


async def test_what_goes_wrong_is_told_apart(endpoint: Endpoint) -> None:
    made = RemoteEmbeddings(endpoint.url, "tiny", None, 5, 2.0)
    with pytest.raises(WrongIndex, match="EMBEDDINGS_DIMENSIONS is 5"):
        await made.dimensions()
    for status, kind in ((400, Refused), (401, SearchDown), (429, SearchDown), (500, SearchDown)):
        endpoint.status = status
        with pytest.raises(kind):
            await made.embed(["a"])
    await made.close()
    nobody = RemoteEmbeddings("http://127.0.0.1:1/v1", "tiny", None, None, 2.0)
    with pytest.raises(SearchDown):
        await nobody.embed(["a"])
    await nobody.close()


async def test_the_service_uses_it(database_url: str, tmp_path: Path, endpoint: Endpoint) -> None:
    given = {"search": "on", "data_dir": tmp_path, "EMBEDDINGS_URL": endpoint.url, "EMBEDDINGS_MODEL": "Tiny/Model v1"}
    async with serving(database_url, **given) as server, connected(server.address) as stub:
        await searchable(server)
        library = Library(await Chat.of_new_user(stub))
        made = await library.create(["some text", "other text"])
        await settled(server)
        hit = (await library.search("other text"))[0]
        assert (hit.document.id, hit.chunk_index) == (made.id, 1)
        assert server.search is not None
        assert server.search._alias == "chathistory_tiny-model-v1_4"
        endpoint.status = 503
        late = await library.create(["late text"])
        await asyncio.sleep(0.3)
        endpoint.status = 200

        async def indexed() -> bool:
            return (await library.get(late.id)).status == INDEXED

        await comes_true(indexed, "it is caught up")
