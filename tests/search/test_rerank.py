"""The order of long, similar chunks with the offline embeddings."""

from __future__ import annotations

from service.server import Server
from tests.search.library import Library
from tests.search.sections import TEXTS, sections
from tests.search.waits import wait_until_indexed

# Questions in other words than the texts', with the heading of the section that answers them. By
# the vectors of whole sections alone, another section comes first for each of them.
QUESTIONS = [
    ("how do I apply to get in and how long do I wait for an apartment", "Joining"),
    ("how early do I have to cancel my lease", "Moving out"),
    ("what does it cost to cancel a booking for relatives", "The guest flat"),
]


async def test_right_one_of_long_similar_sections_comes_first(
    server: Server, library: Library
) -> None:
    for path in sorted((TEXTS / "long").glob("*.md")):
        await library.create(sections(path), title=path.stem)
    await wait_until_indexed(server)
    for question, heading in QUESTIONS:
        hits = await library.search(question)
        assert hits[0].text.startswith(f"## {heading}\n"), question
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert 0 <= scores[-1] < scores[0] <= 1
        (only_hit,) = await library.search(question, limit=1)
        assert only_hit == hits[0]


async def test_unusual_texts_and_queries_are_reranked(server: Server, library: Library) -> None:
    texts = ["?!", "ein Wort", "\n\n", "x" * 200_000, "飛行機が空を飛ぶ", "word " * 20_000]
    document = await library.create(texts)
    await wait_until_indexed(server)
    not_blank = {index for index, text in enumerate(texts) if text.strip()}
    for query in ("word", "... ?", "飛行機", "a b " * 2_000):
        hits = await library.search(query, document_ids=[document.id])
        assert {hit.chunk_index for hit in hits} == not_blank
        assert all(-1 <= hit.score <= 1.001 for hit in hits)
    assert (await library.search("das Wort"))[0].text == "ein Wort"
