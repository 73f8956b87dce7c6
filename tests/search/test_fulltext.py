"""SearchMessages in LEXICAL mode, which uses PostgreSQL alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from service.server import Server
from tests.search.library import LEXICAL, Library
from tests.support.servers import serving


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Yield a server with search off."""
    async with serving(database_url) as server:
        yield server


async def search(library: Library, query: str, **fields: object) -> set[str]:
    hits = await library.search_messages(query, LEXICAL, **fields)
    return {hit.message.content for hit in hits}


async def test_words_match_in_any_case_and_language(library: Library) -> None:
    session = await library.chat.start("Der Zug nach Zürich fährt um 9:15")
    await library.chat.append(session, "the train leaves at nine")
    await library.chat.append(session, "100% of _users_ like C:\\temp")
    assert await search(library, "zürich") == {"Der Zug nach Zürich fährt um 9:15"}
    assert await search(library, "TRAIN nine") == {"the train leaves at nine"}
    assert await search(library, "trai") == set()
    assert await search(library, '"leaves at nine"') == {"the train leaves at nine"}
    assert await search(library, '"nine at"') == set()
    assert await search(library, "zug or train") == {
        "Der Zug nach Zürich fährt um 9:15",
        "the train leaves at nine",
    }
    assert await search(library, "the -nine") == set()
    assert await search(library, "100% _users_") == {"100% of _users_ like C:\\temp"}
    assert await search(library, "'; DROP TABLE users --") == set()


@pytest.mark.case(n=19)
async def test_only_current_texts_of_the_own_messages_match(
    library: Library, others: Library
) -> None:
    session = await library.chat.start("a secret word: zebra")
    (message,) = await library.chat.all(session)
    await others.chat.start("no animals here")
    assert await search(others, "zebra") == set()
    assert await search(others, "zebra", session_id=session) == set()
    assert await search(library, "zebra", session_id=session) == {"a secret word: zebra"}
    await library.chat.update(session, message.id, content="a secret word: giraffe")
    assert await search(library, "zebra") == set()
    await library.chat.delete(session, message.id)
    assert await search(library, "giraffe") == set()


async def test_snippet_marks_the_match_and_escapes_html(library: Library) -> None:
    await library.chat.start(
        "lorem ipsum " * 50 + "<b>the Zebra & friends</b> " + "dolor sit " * 50
    )
    (hit,) = await library.search_messages("zebra", LEXICAL)
    assert "<mark>Zebra</mark> &amp; friends" in hit.snippet
    assert "<b>" not in hit.snippet
    assert len(hit.snippet) < 500


async def test_hits_are_sorted_by_rank_then_newest_first(library: Library) -> None:
    session = await library.chat.start("pears and, far away in another clause altogether, apples")
    await library.chat.append(session, "apples pears")
    await library.chat.append(session, "apples pears")
    hits = await library.search_messages("apples pears", LEXICAL, limit=3)
    assert [hit.message.seq for hit in hits] == [3, 2, 1]
    assert hits[0].score > hits[2].score
    assert len(await library.search_messages("apples", LEXICAL, limit=2)) == 2
