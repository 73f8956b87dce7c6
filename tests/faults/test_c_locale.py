"""Lexical search in databases whose locale knows the letters A to Z only."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from service.store import letter_case
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.search.library import LEXICAL, Library
from tests.support.chat import Chat, new_message
from tests.support.cluster import Cluster, fetch
from tests.support.failures import assert_field_violations
from tests.support.servers import connected, serving

pytestmark = pytest.mark.case(n=516)

MESSAGES = [
    "Ein Zug nach KÖLN",
    "МИР и труд",
    "Ärger in Köln",
    "„KÖLN“ — so steht es da",
    "ΑΘΗΝΑ",
    "It's O'Neil\\Smith",
]
MATCHES = {
    "köln": {0, 2, 3},
    "KÖLN": {0, 2, 3},
    "KöLn": {0, 2, 3},
    "мир": {1},
    "МИР": {1},
    "Труд": {1},
    "ärger": {2},
    "ÄRGER köln": {2},
    "„köln“": {0, 2, 3},
    "Αθηνα": {4},
    '"ZUG NACH köln"': {0},
    '"köln nach"': set(),
    "мир or ärger": {1, 2},
    "köln -ärger": {0, 3},
    "-köln мир": {1},
    "-МИР ärger": {2},
    "o'neil": {5},
    "köl": set(),
}
"""The messages that each query finds."""


@pytest.fixture(params=["C", "POSIX"])
async def library(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Library]:
    """Yield search on a database with this locale, with the messages stored."""
    name = f"locale_{request.param.lower()}"
    connection = await cluster.connect()
    try:
        await connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 "
            f"ENCODING 'UTF8' LOCALE_PROVIDER libc LOCALE '{request.param}'"
        )
    finally:
        await connection.close()
    url = cluster.url(name)
    try:
        await migrations.upgrade(parse(url))
        async with serving(url) as server, connected(server.address) as stub:
            library = Library(await Chat.of_new_user(stub))
            session_id = await library.chat.start("an unrelated message")
            await library.chat.append(session_id, [new_message(text) for text in MESSAGES])
            assert (await fetch(url, "SELECT lower('Ö')"))[0][0] == "Ö"
            yield library
    finally:
        await cluster.drop_database(name)


async def snippets_of(library: Library, query: str, **fields: str) -> dict[int, str]:
    """Search, and return the snippets of the messages that were found, by index."""
    hits = await library.search_messages(query, LEXICAL, **fields)
    return {MESSAGES.index(hit.message.content): hit.snippet for hit in hits}


async def test_words_are_found_in_any_case_of_any_script(library: Library) -> None:
    results = {query: set(await snippets_of(library, query)) for query in MATCHES}
    assert results == MATCHES


async def test_snippets_mark_words_as_they_are_written(library: Library) -> None:
    snippets = await snippets_of(library, "köln zug")
    assert snippets[0] == "<mark>Zug</mark> nach <mark>KÖLN</mark>"
    assert "<mark>МИР</mark> и труд" in (await snippets_of(library, "мир"))[1]
    snippets = await snippets_of(library, "köln")
    assert "<mark>Köln</mark>" in snippets[2]
    assert "KÖLN" in snippets[3]
    assert "<mark>" in snippets[3]
    (snippet,) = (await snippets_of(library, "o'neil smith")).values()
    assert "<mark>" in snippet


async def test_query_that_only_excludes_and_search_of_one_session_work(library: Library) -> None:
    hits = await library.search_messages("-köln -мир", LEXICAL)
    texts = {hit.message.content for hit in hits}
    assert texts == {"an unrelated message", MESSAGES[4], MESSAGES[5]}
    other = await library.chat.start("KÖLN in another session")
    hits = await library.search_messages("köln", LEXICAL, session_id=other)
    assert [hit.message.content for hit in hits] == ["KÖLN in another session"]


async def test_query_of_operators_only_is_rejected_as_elsewhere(library: Library) -> None:
    search = library.search_messages("-" * 40 + "köln", LEXICAL)
    await assert_field_violations(search, "query")


async def test_without_a_collation_the_letters_a_to_z_match_in_any_case(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_none(_connection: object) -> None:
        return None

    monkeypatch.setattr("service.store.fulltext.find_collation", find_none)
    assert set(await snippets_of(library, "ZUG")) == {0}
    assert set(await snippets_of(library, "Köln")) == {2}


@pytest.mark.parametrize("name", letter_case._COLLATIONS)
async def test_each_collation_that_the_server_has_knows_all_scripts(
    database_url: str, name: str
) -> None:
    exists = await fetch(
        database_url,
        "SELECT FROM pg_collation WHERE collname = $1 AND collencoding IN (-1, 6)",
        name,
    )
    if not exists:
        pytest.skip(f"this server has no collation {name}")
    expression = letter_case.folded("$1::text", f'"{name}"')
    rows = await fetch(database_url, f"SELECT {expression}", "„KÖLN“ МИР ΑΘΗΝΑ ÁÇŁ")
    assert rows[0][0].split() == ["köln", "мир", "αθηνα", "áçł"]
