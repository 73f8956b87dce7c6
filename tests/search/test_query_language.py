"""The language of lexical queries: the same messages match as for PostgreSQL's own parser."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from service.server import Server
from service.store import fulltext
from tests.search.library import LEXICAL, Library
from tests.support.chat import new_message
from tests.support.cluster import fetch
from tests.support.servers import serving

QUERY_COUNT = 1500
WORDS = (
    "a", "b", "c", "x", "y", "or", "OR", "Or", "foo", "foo-bar", "bar-foo-a", "it's", "b.c",
    "1.5", "-5", "a@b.de", "https://x.de/a?b=c", "/a/b", "v2.0.1", "100%", "a_b", "c:\\x", "é",
    "Ü", "ü", "ΟΔΟΣ", "οδος", "İ", "i", "東京", "😀", "&amp;", "<b>", "a|b", "a&b", "!a", "(a",
    "b)", "a:*", "'", "''", "\\", "''a", "\ue000", "xy", "xyz",
)  # fmt: skip
EXPECTED = """
SELECT q.n, array_agg(m.content ORDER BY m.content)
FROM unnest($1::text[]) WITH ORDINALITY AS q (query, n)
JOIN chat_messages AS m ON m.user_id = $2
    AND to_tsvector('simple', m.content) @@ websearch_to_tsquery('simple', q.query)
GROUP BY q.n
"""


def random_query(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6))):
        word = rng.choice(WORDS)
        if rng.random() < 0.25:
            word = "".join((rng.choice(("-", "- ", "--", "-")), word))
        if rng.random() < 0.2:
            word = f'"{word} {rng.choice(WORDS)}' + rng.choice(('"', '"', ""))
        if rng.random() < 0.1:
            word = f"-{word}"
        parts += [word, rng.choice(("or", "OR"))] if rng.random() < 0.25 else [word]
    return rng.choice((" ", " ", "  ", "\t", ", ")).join(parts)


def random_text(rng: random.Random) -> str:
    return rng.choice((" ", " ", ", ", "-", "")).join(
        rng.choice(WORDS) for _ in range(rng.choice((1, 2, 3, 5, 8)))
    )


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Yield a server with search off."""
    async with serving(database_url) as server:
        yield server


async def test_random_queries_match_what_postgresql_matches(
    server: Server, library: Library, database_url: str
) -> None:
    rng = random.Random(420)
    texts = sorted({random_text(rng) for _ in range(80)})
    session = await library.chat.start(texts[0])
    await library.chat.append(session, [new_message(text) for text in texts[1:]])
    queries = [random_query(rng) for _ in range(QUERY_COUNT)]
    rows = await fetch(database_url, EXPECTED, queries, library.user_id)
    expected = {n - 1: contents for n, contents in rows}
    assert len(expected) > QUERY_COUNT / 2, "most queries match something"
    assert sum(len(contents) < len(texts) / 2 for contents in expected.values()) > QUERY_COUNT / 4

    async def search_all(connection: AsyncConnection) -> dict[int, list[str]]:
        results: dict[int, list[str]] = {}
        for n, text in enumerate(queries):
            fulltext.check_query(text)
            page = await fulltext.find(
                connection,
                library.user_id,
                text,
                None,
                len(texts),
                lambda matches: [(match.session_id, match.message_id) for match in matches],
                is_cut=False,
            )
            if page.rows:
                results[n] = sorted(match.message.content for match in page.rows)
        return results

    results = await server.database.write(
        search_all, owner_id="test", deadline=asyncio.get_running_loop().time() + 120
    )
    different = {
        queries[n]: (results.get(n, []), sorted(expected.get(n, [])))
        for n in range(QUERY_COUNT)
        if results.get(n, []) != sorted(expected.get(n, []))
    }
    assert not different


@pytest.mark.parametrize(
    ("query", "matching"),
    [
        ("-x or y", {"y", "a", "x y", "this or that"}),
        ("or", {"this or that"}),
        ("a or", set()),
        ("-x -y", {"a", "this or that"}),
        ("!", set()),
        ("-", set()),
        ("---x", {"y", "a", "this or that"}),
    ],
)
async def test_queries_of_operators_match_what_postgresql_matches(
    library: Library, query: str, matching: set[str]
) -> None:
    session = await library.chat.start("x")
    for text in ("y", "a", "x y", "this or that"):
        await library.chat.append(session, text)
    hits = await library.search_messages(query, LEXICAL)
    assert {hit.message.content for hit in hits} == matching
    if query == "-x -y":
        assert [hit.message.seq for hit in hits] == [5, 3], "newest first"
