"""Limits on the cost of one user's searches: connections, permits, words and bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from service.server import Server
from service.store import fulltext
from service.store.db import work_class
from service.store.db.work_class import WorkClass
from service.store.rows import MAX_PAGE_BYTES
from tests.search.library import LEXICAL, Library
from tests.support.chat import new_message
from tests.support.failures import failure_of
from tests.support.servers import serving


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Yield a server with search off."""
    async with serving(database_url) as server:
        yield server


@asynccontextmanager
async def expensive_permits_taken(server: Server) -> AsyncGenerator[None]:
    """Hold every permit of expensive work while the block runs."""
    permits = server.database.expensive_work.permits
    released = asyncio.Event()

    async def hold(_connection: AsyncConnection) -> None:
        await released.wait()

    holders = [
        asyncio.create_task(
            server.database.read(
                hold,
                owner_id=f"holder {number}",
                deadline=asyncio.get_running_loop().time() + 60,
                work_class=WorkClass.EXPENSIVE,
            )
        )
        for number in range(permits.permit_count)
    ]
    try:
        async with asyncio.timeout(20):
            while permits.free_count:
                await asyncio.sleep(0.01)
        yield
    finally:
        released.set()
        await asyncio.gather(*holders)


async def test_search_uses_no_connection_of_the_hot_statements(
    server: Server, library: Library
) -> None:
    await library.chat.start("needle")
    hot_pool = server.database.hot_pool
    connections = [await hot_pool.acquire() for _ in range(hot_pool._size)]
    try:
        async with asyncio.timeout(20):
            (hit,) = await library.search_messages("needle", LEXICAL)
    finally:
        for connection in connections:
            hot_pool.release(connection)
    assert hit.message.content == "needle"


async def test_chat_goes_on_while_searches_wait(server: Server, library: Library) -> None:
    session = await library.chat.start("needle")
    permits = server.database.expensive_work.permits
    async with expensive_permits_taken(server), asyncio.timeout(20):
        searching = asyncio.create_task(library.search_messages("needle", LEXICAL))
        while not permits.waiting_count:
            await asyncio.sleep(0.01)
        await library.chat.append(session, "next")
        assert [message.seq for message in await library.chat.all(session)] == [1, 2]
        await library.chat.get_session(session)
        assert not searching.done()
    assert len(await searching) == 1


async def test_searches_beyond_the_queue_are_refused_and_other_users_are_next(
    server: Server, library: Library, others: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    await library.chat.start("needle")
    await others.chat.start("needle")
    # The machine may be busy: the burst must not time out before the permits are released.
    monkeypatch.setattr(work_class, "MAX_WAIT_S", 60.0)
    order: list[str] = []
    find = fulltext.find

    async def recorded_find(connection: Any, user_id: str, *values: Any, is_cut: bool) -> Any:
        order.append(user_id)
        return await find(connection, user_id, *values, is_cut=is_cut)

    monkeypatch.setattr(fulltext, "find", recorded_find)
    permits = server.database.expensive_work.permits
    limit = work_class.MAX_WAITING_PER_USER
    async with expensive_permits_taken(server), asyncio.timeout(30):
        burst = [
            asyncio.create_task(library.search_messages("needle", LEXICAL))
            for _ in range(limit + 8)
        ]
        while permits.waiting_count < limit or sum(task.done() for task in burst) < 8:
            await asyncio.sleep(0.01)
        refused = [task for task in burst if task.done()]
        other = asyncio.create_task(others.search_messages("needle", LEXICAL))
        while permits.waiting_count == limit:
            await asyncio.sleep(0.01)
        assert not order
    for task in refused:
        failure = await failure_of(task)
        assert failure.reason == "OVERLOADED"
        assert failure.retry_after
    assert len(refused) == 8
    replies = await asyncio.gather(*(task for task in burst if task not in refused), other)
    assert all(len(hits) == 1 for hits in replies)
    assert others.user_id in order[:2], "the other user's search is served in rotation"


@pytest.mark.parametrize(
    "query",
    [
        "-x " * 2700,
        " ".join(f"w{n}" for n in range(65)),
        " or ".join(f"w{n}" for n in range(900)),
        "-".join("abcdefgh") + " " + "-".join("ijklmnop" * 8),
        '"' + "a b " * 33 + '"',
        "a_" * 1024,
        "a_" * 1025,
    ],
    ids=["excluded", "words", "alternatives", "compounds", "phrase", "one word", "characters"],
)
async def test_lexical_query_of_too_many_words_is_rejected(
    library: Library, server: Server, query: str
) -> None:
    await library.chat.start("hello world a b c d e")
    started = server.database.expensive_work.permits.free_count
    failure = await failure_of(library.search_messages(query, LEXICAL))
    assert failure.fields == ["query"]
    limit = fulltext.MAX_QUERY_CHARS if len(query) > 2048 else fulltext.MAX_TERMS
    assert f"at most {limit}" in failure.message
    assert server.database.expensive_work.permits.free_count == started


@pytest.mark.parametrize(
    "query",
    [
        "--" * 15 + "needle",
        "needle " + "!&|()<>:*" * 200,
        "needle " + "'" * 2000,
        "x" * 2048,
        " ".join(f"-w{n}" for n in range(64)),
        " ".join(["needle"] * 64),
        "\\" * 2000 + " needle",
    ],
    ids=["minus", "operators", "quotes", "long word", "64 excluded", "64 words", "backslashes"],
)
async def test_query_within_the_limit_is_answered(library: Library, query: str) -> None:
    await library.chat.start("a needle")
    hits = await library.search_messages(query, LEXICAL)
    assert len(hits) == (query != "x" * 2048)


@pytest.mark.parametrize("query", ["-" * 100 + "needle", "- ! " * 50])
async def test_lexical_query_of_too_many_operators_is_rejected(
    library: Library, query: str
) -> None:
    await library.chat.start("a needle")
    failure = await failure_of(library.search_messages(query, LEXICAL))
    assert failure.fields == ["query"]


async def test_text_beyond_the_bytes_that_are_ranked_is_not_searched(library: Library) -> None:
    """Messages are parsed from the newest to the oldest, up to a number of bytes."""
    session = await library.chat.start("needle needle")
    text = "needle " + "x" * (fulltext.MAX_TEXT_CHARS - 7)
    count = fulltext.MAX_CANDIDATE_BYTES // fulltext.MAX_TEXT_CHARS
    for _ in range(count // 16 - 1):
        await library.chat.append(session, [new_message(text) for _ in range(16)])
    # Texts that do not contain the word count for nothing.
    for _ in range(16):
        await library.chat.append(session, [new_message("x" * 32_768) for _ in range(16)])
    assert (await found_seqs(library, "needle"))[0] == 1
    await library.chat.append(session, [new_message(text) for _ in range(16)])
    assert 1 not in await found_seqs(library, "needle")


async def found_seqs(library: Library, query: str) -> list[int]:
    hits = await library.search_messages(query, LEXICAL, limit=10)
    return [hit.message.seq for hit in hits]


async def test_reply_with_long_snippets_stays_within_its_limit(library: Library) -> None:
    text = "needle " + "&" * 30_000 + " needle"
    session = await library.chat.start(text)
    for _ in range(9):
        await library.chat.append(session, [new_message(text) for _ in range(11)])
    reply = await library.stub.SearchMessages(
        message_pb2.SearchMessagesRequest(
            user_id=library.user_id, query="needle", mode=LEXICAL, limit=100
        )
    )
    assert MAX_PAGE_BYTES / 2 < reply.ByteSize() <= MAX_PAGE_BYTES
    for hit in reply.hits:
        assert len(hit.snippet) < 5 * fulltext.MAX_SNIPPET_CHARS + 100
        assert hit.snippet.startswith("<mark>needle</mark>")
        assert hit.snippet.count("<mark>") == hit.snippet.count("</mark>")


@pytest.mark.parametrize(
    ("text", "snippet"),
    [
        ("&" * 30_000 + " needle", "<mark>needle</mark>"),
        ("y" * 30_000 + " needle " + "z" * 30_000, "<mark>needle</mark>"),
        ("x" * 1990 + "needle", ""),
        ("\ue001 needle \ue000 and \ue000\ue000 bold", "<mark>needle</mark>   and    bold"),
        ("needle < banana & apples", "<mark>needle</mark> &lt; banana &amp; apples"),
    ],
    ids=["long before", "long around", "no match", "forged marks", "special characters"],
)
async def test_snippet_is_short_and_marks_only_the_match(
    library: Library, text: str, snippet: str
) -> None:
    await library.chat.start(text)
    hits = await library.search_messages("needle", LEXICAL)
    assert len(hits) == bool(snippet)
    for hit in hits:
        assert snippet in hit.snippet
        assert len(hit.snippet) < 5 * fulltext.MAX_SNIPPET_CHARS + 100
        assert hit.snippet.count("<mark>") == hit.snippet.count("</mark>") == 1


@pytest.mark.parametrize("run", ["a_", "~/", "./", "aGVsbG8gd29ybGQ_"])
async def test_text_that_postgresql_parses_slowly_is_searched_within_the_statement_timeout(
    library: Library, run: str
) -> None:
    """PostgreSQL's parser is quadratic in the length of such a run."""
    await library.chat.start("needle " + (run * 32_768)[:32_700] + " thread")
    for query in ("needle", "thread"):
        (hit,) = await library.search_messages(query, LEXICAL)
        assert f"<mark>{query}</mark>" in hit.snippet


async def test_search_holds_the_bytes_of_its_hits(
    server: Server, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await library.chat.start("needle")
    budget = server.budget
    charge, charges = budget.charge, list[tuple[str, int]]()

    def recorded_charge(owner_id: str, connection: str, n_bytes: int) -> None:
        charges.append((owner_id, n_bytes))
        charge(owner_id, connection, n_bytes)

    monkeypatch.setattr(budget, "charge", recorded_charge)
    (hit,) = await library.search_messages("needle", LEXICAL)
    assert hit.message.session_id == session
    assert (library.user_id, MAX_PAGE_BYTES) in charges
    async with asyncio.timeout(20):  # The reply counts until gRPC has sent it.
        while budget.held:
            await asyncio.sleep(0.01)
