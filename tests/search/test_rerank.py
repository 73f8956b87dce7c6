"""Which of several long, alike chunks comes first with the offline embeddings."""

from __future__ import annotations

from pathlib import Path

from service.server import Server
from tests.search.library import Library
from tests.search.waits import wait_until_indexed

TEXTS = Path(__file__).parent / "texts" / "long"

# In other words than the texts'; by the vectors of whole sections, another one comes first each time.
QUESTIONS = [
    ("how do I apply to get in and how long do I wait for an apartment", "Joining"),
    ("how early do I have to cancel my lease", "Moving out"),
    ("what does it cost to cancel a booking for relatives", "The guest flat"),
]


async def test_of_long_and_alike_sections_the_right_one_comes_first(
    server: Server, library: Library
) -> None:
    for path in sorted(TEXTS.glob("*.md")):
        await library.create(
            ["## " + part.strip() for part in path.read_text().split("\n## ")[1:]], title=path.stem
        )
    await wait_until_indexed(server)
    for question, heading in QUESTIONS:
        hits = await library.search(question)
        assert hits[0].text.startswith(f"## {heading}\n"), question
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert 0 <= scores[-1] < scores[0] <= 1
        (only,) = await library.search(question, limit=1)
        assert only == hits[0]


async def test_texts_and_questions_of_any_kind_are_compared(
    server: Server, library: Library
) -> None:
    texts = ["?!", "ein Wort", "\n\n", "x" * 200_000, "飛行機が空を飛ぶ", "word " * 20_000]
    made = await library.create(texts)
    await wait_until_indexed(server)
    there = {n for n, text in enumerate(texts) if text.strip()}
    for question in ("word", "... ?", "飛行機", "a b " * 2_000):
        hits = await library.search(question, document_ids=[made.id])
        assert {hit.chunk_index for hit in hits} == there
        assert all(-1 <= hit.score <= 1.001 for hit in hits)
    assert (await library.search("das Wort"))[0].text == "ein Wort"
