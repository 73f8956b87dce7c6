"""Documents: created, grown, listed, changed and erased."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from chathistory.v1 import document_pb2, message_pb2

from service.ids import SYSTEM_USER_ID
from service.server import Server
from tests.search.library import SHARED, Library, chunks
from tests.support.chat import new_id
from tests.support.failures import failure_of
from tests.support.servers import AsyncStub, ServerProcess, connected, serving

SHA = "ab" * 32


StartProcess = Callable[..., Awaitable[ServerProcess]]


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Give the service without search: documents are kept all the same."""
    async with serving(database_url) as started:
        yield started


async def refused(call: Awaitable[object], code: grpc.StatusCode, reason: str) -> None:
    failure = await failure_of(call)
    assert (failure.code, failure.reason) == (code, reason)


async def test_a_document_keeps_what_it_was_given(library: Library) -> None:
    made = await library.create(
        ["one", "two"], title="Tales", source_uri="file:///tales.md", mime_type="text/markdown", content_sha256=SHA.upper(),
        size_bytes=7, metadata={"language": "en"},
    )  # fmt: skip
    read = await library.get(made.id)
    assert read == made
    assert (read.title, read.chunk_count, read.content_sha256, read.size_bytes) == (
        "Tales",
        2,
        SHA,
        7,
    )
    assert read.user_id == library.user_id
    assert read.status == document_pb2.DOCUMENT_STATUS_PENDING
    assert dict(read.metadata) == {"language": "en"}
    assert await library.read_chunks(made.id) == ["one", "two"]


async def test_a_retry_and_the_same_content_return_what_is_there(library: Library) -> None:
    id_ = new_id()
    first, again = [await library.create(["one"], id=id_, title="T") for _ in range(2)]
    assert first == again
    await refused(
        library.create(["other"], id=id_, title="T"), grpc.StatusCode.ALREADY_EXISTS, "ID_TAKEN"
    )
    made = await library.create(["text"], content_sha256=SHA, source_uri="a")
    assert (await library.create(["text"], content_sha256=SHA, source_uri="a")).id == made.id
    assert (await library.create(["text"], content_sha256=SHA, source_uri="b")).id != made.id
    at_once = await asyncio.gather(
        *(library.create(["x"], content_sha256="cd" * 32) for _ in range(20))
    )
    assert len({each.id for each in at_once}) == 1


async def test_chunks_are_added_without_gap_and_a_retry_changes_nothing(library: Library) -> None:
    made = await library.create(["0", "1"])
    for _ in range(2):
        grown = await library.append(made.id, 1, ["1", "2", "3"])
        assert (grown.chunk_count, grown.etag) == (4, made.etag)
    assert await library.read_chunks(made.id, page_size=3) == ["0", "1", "2", "3"]
    await refused(
        library.append(made.id, 5, ["gap"]), grpc.StatusCode.INVALID_ARGUMENT, "FIELD_VIOLATION"
    )
    await refused(library.append(made.id, 3, ["other"]), grpc.StatusCode.ALREADY_EXISTS, "ID_TAKEN")
    await refused(
        library.append(new_id(), 0, ["x"]), grpc.StatusCode.NOT_FOUND, "DOCUMENT_NOT_FOUND"
    )
    at_once = [library.append(made.id, 4, ["4", "5"]) for _ in range(20)]
    assert {each.chunk_count for each in await asyncio.gather(*at_once)} == {6}


async def test_large_chunks_come_in_pages_that_a_client_takes(library: Library) -> None:
    texts = [f"{n}" * 200_000 for n in range(5)]
    made = await library.create(texts[:5])
    for start in range(5, 25, 5):
        await library.append(made.id, start, texts)
    assert len(await library.read_chunks(made.id, page_size=1000)) == 25
    too_much = ["x" * 250_000] * 5
    await refused(library.create(too_much), grpc.StatusCode.INVALID_ARGUMENT, "FIELD_VIOLATION")


async def test_lists_are_filtered_and_paged(library: Library) -> None:
    made = [await library.create(source_uri=f"s{n % 2}", mime_type=f"t{n % 3}") for n in range(12)]
    everything = await library.list_all(page_size=5)
    assert [each.id for each in everything] == [each.id for each in reversed(made)]
    some = await library.list_all(page_size=1, source_uri="s1", mime_type="t2")
    assert [each.id for each in some] == [made[11].id, made[5].id]
    assert await library.list_all(status=document_pb2.DOCUMENT_STATUS_FAILED) == []
    token = (await library.list_page(page_size=1)).next_page_token
    await refused(
        library.list_page(page_size=1, page_token=token, source_uri="s1"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_PAGE_TOKEN",
    )


async def test_updates_need_the_etag_and_may_not_take_another_documents_place(
    library: Library,
) -> None:
    made = await library.create(title="old", source_uri="a", content_sha256=SHA)
    other = await library.create(source_uri="b", content_sha256=SHA)
    changed = await library.update(id=made.id, title="new", etag=made.etag)
    assert (changed.title, changed.source_uri) == ("new", "a")
    stale = library.update(id=made.id, title="newer", etag=made.etag)
    await refused(stale, grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    await refused(
        library.update(id=other.id, source_uri="a"), grpc.StatusCode.ALREADY_EXISTS, "ID_TAKEN"
    )
    wrong = library.update(["status"], id=made.id)
    await refused(wrong, grpc.StatusCode.INVALID_ARGUMENT, "FIELD_VIOLATION")


async def test_erased_documents_are_gone(library: Library) -> None:
    made = await library.create(["x"])
    await library.delete(made.id)
    await refused(library.get(made.id), grpc.StatusCode.NOT_FOUND, "DOCUMENT_NOT_FOUND")
    await refused(library.delete(made.id), grpc.StatusCode.NOT_FOUND, "DOCUMENT_NOT_FOUND")
    await library.delete(made.id, allow_missing=True)
    await refused(library.read_chunks(made.id), grpc.StatusCode.NOT_FOUND, "DOCUMENT_NOT_FOUND")


async def test_shared_documents_are_everybodys_to_read(
    library: Library, others: Library, stub: AsyncStub, server: Server
) -> None:
    made = await library.create(["for all"], scope=SHARED, title="handbook")
    assert (made.user_id, made.scope) == (SYSTEM_USER_ID, SHARED)
    private = await library.create(["for me"])
    assert await others.read_chunks(made.id) == ["for all"]
    assert [each.id for each in await others.list_all()] == [made.id]
    assert [each.id for each in await library.list_all()] == [private.id, made.id]
    assert [
        each.id for each in await library.list_all(scope=document_pb2.DOCUMENT_SCOPE_PRIVATE)
    ] == [private.id]
    nobody = document_pb2.CreateDocumentRequest(
        document=document_pb2.Document(scope=SHARED), chunks=chunks(["x"])
    )
    assert (await stub.CreateDocument(nobody)).document.user_id == SYSTEM_USER_ID
    # An id is unique for its owner only: one's own comes first.
    own = await others.create(["mine"], id=made.id)
    assert (await others.get(made.id)).user_id == others.user_id
    assert (await library.get(own.id)).scope == SHARED


async def test_without_search_its_calls_say_so(library: Library) -> None:
    off = grpc.StatusCode.FAILED_PRECONDITION
    await refused(library.search("x"), off, "SEARCH_DISABLED")
    await refused(library.search_messages("x"), off, "SEARCH_DISABLED")
    session = await library.chat.start("words are found all the same")
    hits = await library.search_messages("WORDS", message_pb2.SEARCH_MODE_UNSPECIFIED)
    assert [hit.message.session_id for hit in hits] == [session]


async def test_without_search_none_of_it_is_imported(start_process: StartProcess) -> None:
    process = await start_process()
    async with connected(process.address):
        maps = await asyncio.to_thread(Path(f"/proc/{process.pid}/maps").read_text)
    assert "numpy" not in maps
    assert "tokenizers" not in maps
