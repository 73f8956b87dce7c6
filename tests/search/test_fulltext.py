"""SearchMessages by words, on PostgreSQL alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from service.server import Server
from tests.search.library import LEXICAL, Library
from tests.support.servers import serving


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Give the service without search by meaning."""
    async with serving(database_url) as started:
        yield started


async def found(library: Library, query: str, **fields: object) -> set[str]:
    return {hit.message.content for hit in await library.search_messages(query, LEXICAL, **fields)}


async def test_words_in_any_case_and_language(library: Library) -> None:
    session = await library.chat.start("Der Zug nach Zürich fährt um 9:15")
    await library.chat.append(session, "the train leaves at nine")
    await library.chat.append(session, "100% of _users_ like C:\\temp")
    assert await found(library, "zürich") == {"Der Zug nach Zürich fährt um 9:15"}
    assert await found(library, "TRAIN nine") == {"the train leaves at nine"}
    assert await found(library, "trai") == set()
    assert await found(library, '"leaves at nine"') == {"the train leaves at nine"}
    assert await found(library, '"nine at"') == set()
    assert await found(library, "zug or train") == {
        "Der Zug nach Zürich fährt um 9:15",
        "the train leaves at nine",
    }
    assert await found(library, "the -nine") == set()
    assert await found(library, "100% _users_") == {"100% of _users_ like C:\\temp"}
    assert await found(library, "'; DROP TABLE users --") == set()


@pytest.mark.case(n=19)
async def test_only_ones_own_and_only_what_is_there(library: Library, others: Library) -> None:
    session = await library.chat.start("a secret word: zebra")
    (message,) = await library.chat.all(session)
    await others.chat.start("no animals here")
    assert await found(others, "zebra") == set()
    assert await found(others, "zebra", session_id=session) == set()
    assert await found(library, "zebra", session_id=session) == {"a secret word: zebra"}
    await library.chat.update(session, message.id, content="a secret word: giraffe")
    assert await found(library, "zebra") == set()
    await library.chat.delete(session, message.id)
    assert await found(library, "giraffe") == set()


async def test_the_match_is_marked_and_the_rest_escaped(library: Library) -> None:
    await library.chat.start(
        "lorem ipsum " * 50 + "<b>the Zebra & friends</b> " + "dolor sit " * 50
    )
    (hit,) = await library.search_messages("zebra", LEXICAL)
    assert "<mark>Zebra</mark> &amp; friends" in hit.snippet
    assert "<b>" not in hit.snippet
    assert len(hit.snippet) < 500


async def test_better_matches_come_first_and_then_newer_ones(library: Library) -> None:
    session = await library.chat.start("pears and, far away in another clause altogether, apples")
    await library.chat.append(session, "apples pears")
    await library.chat.append(session, "apples pears")
    hits = await library.search_messages("apples pears", LEXICAL, limit=3)
    assert [hit.message.seq for hit in hits] == [3, 2, 1]
    assert hits[0].score > hits[2].score
    assert len(await library.search_messages("apples", LEXICAL, limit=2)) == 2
