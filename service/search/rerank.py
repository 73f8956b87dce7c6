"""How near texts are to a question, by meaning and by words: what tells long texts apart that are alike.

The mean of a text's words says what the whole is about, and most of that is what its neighbours are about too. Here a word counts the
more the fewer of the texts have it, the passage that comes nearest counts as much as the whole, and so does what is said in the question's
own words. Only the child process imports this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

PASSAGE = 40
"""Words of a passage; one begins at every half of that."""
STEM = 5
"""Letters by which words are compared: in many languages the forms of a word begin alike."""
WHOLE, PART, WORDS = 0.4, 0.4, 0.2
"""What counts how much: the whole text and its best passage, both by meaning, and the share of the question's words."""
_ASKED = 100
"""Words of a question that are looked at."""
_HEADING = 80
"""Characters of a text's first line that are taken for its heading."""
_WORD = re.compile(r"[^\W_]+")

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def scores(
    question: str, texts: Sequence[tuple[str, str]], vectors: Callable[[list[str]], Floats]
) -> list[float] | None:
    """Return how near each text, given after the title of its document, is to a question: 0 to 1; None if that has no words.

    `vectors` makes one row a word, the longer the more the word counts.
    """
    asked = _words(question)[:_ASKED]
    if not asked:
        return None
    bodies = [_words(text) for _, text in texts]
    heads = [
        _words(f"{title} {text.lstrip().splitlines()[0][:_HEADING] if text.strip() else ''}")
        for title, text in texts
    ]
    rows = {
        word: n
        for n, word in enumerate(
            dict.fromkeys(word for each in (asked, *heads, *bodies) for word in each)
        )
    }
    stems = {stem: n for n, stem in enumerate(dict.fromkeys(word[:STEM] for word in rows))}
    stem_of = np.array([stems[word[:STEM]] for word in rows])
    numbered = [_numbers(rows, body) for body in bodies]
    rarity = _rarity([stem_of[body] for body in numbered], len(stems))

    meaning = vectors(list(rows)) * np.sqrt(rarity[stem_of])[:, None]
    direction = _unit(meaning[_numbers(rows, asked)].sum(axis=0))
    wanted = np.unique(stem_of[_numbers(rows, asked)])
    share = rarity[wanted] / rarity[wanted].sum()
    is_wanted = (stem_of[:, None] == wanted).astype(np.float32)
    found = []
    for head, body in zip((_numbers(rows, head) for head in heads), numbered, strict=True):
        near = _unit(_passages(meaning, head, body)) @ direction
        said = (_passages(is_wanted, head, body) > 0) @ share
        score = WHOLE * near[0] + PART * near[1:].max() + WORDS * said[1:].max()
        found.append(float(np.clip(score, 0, 1)))
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _numbers(rows: dict[str, int], words: Sequence[str]) -> Numbers:
    return np.array([rows[word] for word in words], np.int64)


def _rarity(texts: Sequence[Numbers], stems: int) -> Floats:
    """Return how much a word tells, by how few of the texts have it (the IDF of BM25)."""
    have = np.zeros(stems, np.float32)
    for each in texts:
        have[np.unique(each)] += 1
    told: Floats = np.log1p((len(texts) - have + 0.5) / (have + 0.5))
    return told


def _passages(table: Floats, head: Numbers, body: Numbers) -> Floats:
    """Return the sums of what the table says of a text's words: of all, then of each passage; its heading belongs to each."""
    if not len(body):
        return np.tile(table[head].sum(axis=0), (2, 1))
    halves = np.add.reduceat(table[body], np.arange(0, len(body), PASSAGE // 2), axis=0)
    passages = halves[:-1] + halves[1:] if len(halves) > 1 else halves
    found: Floats = np.vstack((halves.sum(axis=0), passages)) + table[head].sum(axis=0)
    return found


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    made: Floats = np.divide(vectors, np.where(length > 0, length, 1), dtype=np.float32)
    return made
