"""Documents: create, append, list, update and delete."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import pytest
from chathistory.v1 import document_pb2, message_pb2

from service.ids import SYSTEM_USER_ID
from service.server import Server
from tests.search.library import SHARED, Library, chunks
from tests.support.chat import new_id
from tests.support.failures import assert_fails, assert_field_violations
from tests.support.servers import AsyncStub, ServerProcess, connected, serving

SHA256 = "ab" * 32

StartProcess = Callable[..., Awaitable[ServerProcess]]


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Yield a server with search off, which stores documents too."""
    async with serving(database_url) as server:
        yield server


async def test_created_document_is_returned_with_all_its_fields(library: Library) -> None:
    created = await library.create(
        ["one", "two"],
        title="Tales",
        source_uri="file:///tales.md",
        mime_type="text/markdown",
        content_sha256=SHA256.upper(),
        size_bytes=7,
        metadata={"language": "en"},
    )
    document = await library.get(created.id)
    assert document == created
    assert (document.title, document.chunk_count) == ("Tales", 2)
    assert (document.content_sha256, document.size_bytes) == (SHA256, 7)
    assert document.user_id == library.user_id
    assert document.status == document_pb2.DOCUMENT_STATUS_PENDING
    assert dict(document.metadata) == {"language": "en"}
    assert await library.read_chunks(document.id) == ["one", "two"]


async def test_create_with_a_known_id_or_content_returns_the_stored_document(
    library: Library,
) -> None:
    id_ = new_id()
    first, retried = [await library.create(["one"], id=id_, title="T") for _ in range(2)]
    assert first == retried
    await assert_fails(library.create(["other"], id=id_, title="T"), "ID_TAKEN")
    document = await library.create(["text"], content_sha256=SHA256, source_uri="a")
    same = await library.create(["text"], content_sha256=SHA256, source_uri="a")
    elsewhere = await library.create(["text"], content_sha256=SHA256, source_uri="b")
    assert same.id == document.id
    assert elsewhere.id != document.id
    concurrent = await asyncio.gather(
        *(library.create(["x"], content_sha256="cd" * 32) for _ in range(20))
    )
    assert len({document.id for document in concurrent}) == 1


async def test_concurrent_equal_creates_create_one_document(library: Library) -> None:
    for number in range(10):
        sent = {"id": new_id(), "source_uri": f"s{number}", "content_sha256": SHA256}
        created = await asyncio.gather(*(library.create(["a", "b"], **sent) for _ in range(12)))
        assert {(it.id, it.chunk_count) for it in created} == {(sent["id"], 2)}


async def test_source_has_at_most_2048_characters_and_2560_bytes(
    library: Library,
) -> None:
    """An entry of the index that keeps documents unique holds 2,704 bytes."""
    generator = random.Random(1)  # An index compresses what repeats.
    ascii_uri = "".join(chr(generator.randrange(33, 127)) for _ in range(2048))
    wide_uri = "".join(chr(generator.randrange(0x1F300, 0x1F900)) for _ in range(640))
    for uri in (ascii_uri, wide_uri):
        stored = await library.create(source_uri=uri, content_sha256=SHA256)
        assert stored.source_uri == uri
        other = await library.create(source_uri="other", content_sha256=SHA256)
        updated = await library.update(id=other.id, source_uri=uri[::-1])
        assert updated.source_uri == uri[::-1]
    document = await library.create()
    for call in (
        library.create(source_uri=wide_uri + "a"),
        library.update(id=document.id, source_uri=wide_uri + "a"),
        library.create(source_uri=ascii_uri + "a"),
    ):
        await assert_field_violations(call, "document.source_uri")


async def test_append_allows_no_gap_and_a_retry_changes_nothing(library: Library) -> None:
    document = await library.create(["0", "1"])
    for _ in range(2):
        appended = await library.append(document.id, 1, ["1", "2", "3"])
        assert (appended.chunk_count, appended.etag) == (4, document.etag)
    assert await library.read_chunks(document.id, page_size=3) == ["0", "1", "2", "3"]
    await assert_fails(library.append(document.id, 5, ["gap"]), "FIELD_VIOLATION")
    await assert_fails(library.append(document.id, 3, ["other"]), "ID_TAKEN")
    await assert_fails(library.append(new_id(), 0, ["x"]), "DOCUMENT_NOT_FOUND")
    concurrent = await asyncio.gather(
        *(library.append(document.id, 4, ["4", "5"]) for _ in range(20))
    )
    assert {document.chunk_count for document in concurrent} == {6}


async def test_pages_of_large_chunks_stay_within_the_message_limit(library: Library) -> None:
    texts = [f"{n}" * 200_000 for n in range(5)]
    document = await library.create(texts)
    for start in range(5, 25, 5):
        await library.append(document.id, start, texts)
    assert len(await library.read_chunks(document.id, page_size=1000)) == 25
    await assert_fails(library.create(["x" * 250_000] * 5), "FIELD_VIOLATION")


async def test_lists_are_filtered_and_paged(library: Library) -> None:
    documents = [
        await library.create(source_uri=f"s{n % 2}", mime_type=f"t{n % 3}") for n in range(12)
    ]
    listed = await library.list_all(page_size=5)
    assert [document.id for document in listed] == [document.id for document in documents[::-1]]
    filtered = await library.list_all(page_size=1, source_uri="s1", mime_type="t2")
    assert [document.id for document in filtered] == [documents[11].id, documents[5].id]
    assert await library.list_all(status=document_pb2.DOCUMENT_STATUS_FAILED) == []
    token = (await library.list_page(page_size=1)).next_page_token
    with_other_filter = library.list_page(page_size=1, page_token=token, source_uri="s1")
    await assert_fails(with_other_filter, "BAD_PAGE_TOKEN")


async def test_update_with_a_stale_etag_or_another_documents_source_fails(
    library: Library,
) -> None:
    document = await library.create(title="old", source_uri="a", content_sha256=SHA256)
    other = await library.create(source_uri="b", content_sha256=SHA256)
    updated = await library.update(id=document.id, title="new", etag=document.etag)
    assert (updated.title, updated.source_uri) == ("new", "a")
    stale = library.update(id=document.id, title="newer", etag=document.etag)
    await assert_fails(stale, "ETAG_MISMATCH")
    await assert_fails(library.update(id=other.id, source_uri="a"), "ID_TAKEN")
    await assert_fails(library.update(["status"], id=document.id), "FIELD_VIOLATION")


async def test_user_id_inside_a_document_must_be_its_owner(
    library: Library, others: Library
) -> None:
    private = await library.create(title="private", user_id=library.user_id.upper())
    shared = await library.create(title="shared", scope=SHARED, user_id=SYSTEM_USER_ID)
    for call in (
        library.create(user_id=SYSTEM_USER_ID),
        library.create(user_id=others.user_id),
        library.create(scope=SHARED, user_id=library.user_id),
        library.update(id=private.id, user_id=SYSTEM_USER_ID, title="x"),
        library.update(id=private.id, user_id=others.user_id, title="x"),
        library.update(id=shared.id, user_id=library.user_id, title="x"),
    ):
        await assert_field_violations(call, "document.user_id")
    for document in (private, shared):
        updated = await library.update(
            id=document.id, user_id=document.user_id.upper(), mime_type="text/plain"
        )
        assert (updated.user_id, updated.title) == (document.user_id, document.title)


async def test_deleted_document_is_not_found(library: Library) -> None:
    document = await library.create(["x"])
    await library.delete(document.id)
    await assert_fails(library.get(document.id), "DOCUMENT_NOT_FOUND")
    await assert_fails(library.delete(document.id), "DOCUMENT_NOT_FOUND")
    await library.delete(document.id, allow_missing=True)
    await assert_fails(library.read_chunks(document.id), "DOCUMENT_NOT_FOUND")


async def test_shared_document_is_readable_by_every_user(
    library: Library, others: Library, stub: AsyncStub
) -> None:
    shared = await library.create(["for all"], scope=SHARED, title="handbook")
    assert (shared.user_id, shared.scope) == (SYSTEM_USER_ID, SHARED)
    private = await library.create(["for me"])
    assert await others.read_chunks(shared.id) == ["for all"]
    assert [document.id for document in await others.list_all()] == [shared.id]
    assert [document.id for document in await library.list_all()] == [private.id, shared.id]
    only_private = await library.list_all(scope=document_pb2.DOCUMENT_SCOPE_PRIVATE)
    assert [document.id for document in only_private] == [private.id]
    without_user = document_pb2.CreateDocumentRequest(
        document=document_pb2.Document(scope=SHARED), chunks=chunks(["x"])
    )
    assert (await stub.CreateDocument(without_user)).document.user_id == SYSTEM_USER_ID


async def test_own_document_hides_a_shared_one_with_the_same_id(
    library: Library, others: Library
) -> None:
    shared = await library.create(["for all"], scope=SHARED)
    await others.create(["mine"], id=shared.id)
    assert (await others.get(shared.id)).user_id == others.user_id
    assert (await library.get(shared.id)).scope == SHARED


async def test_search_off_disables_semantic_search_only(library: Library) -> None:
    await assert_fails(library.search("x"), "SEARCH_DISABLED")
    await assert_fails(library.search_messages("x"), "SEARCH_DISABLED")
    session = await library.chat.start("words match without an index")
    hits = await library.search_messages("WORDS", message_pb2.SEARCH_MODE_UNSPECIFIED)
    assert [hit.message.session_id for hit in hits] == [session]


async def test_search_off_loads_no_package_of_search(start_process: StartProcess) -> None:
    process = await start_process()
    async with connected(process.address):
        maps = await asyncio.to_thread(Path(f"/proc/{process.pid}/maps").read_text)
    assert "numpy" not in maps
    assert "tokenizers" not in maps
