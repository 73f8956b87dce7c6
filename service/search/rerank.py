"""Rerank texts by their similarity to a query, in meaning and in words.

The vector of a long text is the mean of its words' vectors, and so resembles the vectors of other
texts on the same subject. Therefore a word weighs more here when fewer of the texts contain it, the
best passage counts as much as the whole text, and the query's own words count too. Only the search
process imports this module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

PASSAGE_WORDS = 40
"""Words of a passage. Passages overlap by half."""
STEM_CHARS = 5
"""Words are compared by this prefix: in many languages the forms of a word share their start."""
TEXT_WEIGHT, PASSAGE_WEIGHT, WORDS_WEIGHT = 0.4, 0.4, 0.2
"""Weights of the whole text and of its best passage, both by vector, and of the query's words."""
MAX_VOCABULARY = 12_000
"""Different words that have a vector; each takes about 4 KiB of memory. Natural texts of one query
have fewer. Beyond it, the words of the last texts are ignored."""
_MAX_QUERY_WORDS = 100
_MAX_HEADING_CHARS = 80
"""Characters of a text's first line, which is used as its heading."""
_WORD = re.compile(r"[^\W_]+")

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def scores(
    query: str, texts: Sequence[tuple[str, str]], vectors: Callable[[list[str]], Floats]
) -> list[float] | None:
    """Return the score of each text, 0 to 1; None if the query has no words.

    Args:
        texts: Pairs of a document's title and the text.
        vectors: Returns one row a word. A longer vector gives its word more weight.
    """
    query_words = _words(query)[:_MAX_QUERY_WORDS]
    if not query_words:
        return None
    bodies = [_words(text) for _, text in texts]
    headings = [_words(f"{title} {_first_line(text)}") for title, text in texts]
    vocabulary = dict.fromkeys(
        word for words in (query_words, *headings, *bodies) for word in words
    )
    rows = {word: row for row, word in enumerate(itertools.islice(vocabulary, MAX_VOCABULARY))}
    stems = {
        stem: index for index, stem in enumerate(dict.fromkeys(word[:STEM_CHARS] for word in rows))
    }
    stem_of_row = np.array([stems[word[:STEM_CHARS]] for word in rows])
    body_rows = [_rows(rows, body) for body in bodies]
    rarity = _rarity([stem_of_row[body] for body in body_rows], len(stems))

    weighted = vectors(list(rows)) * np.sqrt(rarity[stem_of_row])[:, None]
    query_rows = _rows(rows, query_words)
    query_vector = _unit(weighted[query_rows].sum(axis=0))
    query_stems = np.unique(stem_of_row[query_rows])
    stem_share = rarity[query_stems] / rarity[query_stems].sum()
    is_query_stem = (stem_of_row[:, None] == query_stems).astype(np.float32)
    results = []
    for heading, body in zip((_rows(rows, words) for words in headings), body_rows, strict=True):
        similarity = _unit(_passage_sums(weighted, heading, body)) @ query_vector
        word_share = (_passage_sums(is_query_stem, heading, body) > 0) @ stem_share
        score = (
            TEXT_WEIGHT * similarity[0]
            + PASSAGE_WEIGHT * similarity[1:].max()
            + WORDS_WEIGHT * word_share[1:].max()
        )
        results.append(float(np.clip(score, 0, 1)))
    return results


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _first_line(text: str) -> str:
    return text.lstrip().splitlines()[0][:_MAX_HEADING_CHARS] if text.strip() else ""


def _rows(rows: dict[str, int], words: Sequence[str]) -> Indices:
    return np.array([rows[word] for word in words if word in rows], np.int64)


def _rarity(texts: Sequence[Indices], stem_count: int) -> Floats:
    """Return the weight of each stem by the number of texts that contain it (the IDF of BM25)."""
    text_counts = np.zeros(stem_count, np.float32)
    for text in texts:
        text_counts[np.unique(text)] += 1
    rarity: Floats = np.log1p((len(texts) - text_counts + 0.5) / (text_counts + 0.5))
    return rarity


def _passage_sums(table: Floats, heading: Indices, body: Indices) -> Floats:
    """Return the table's sum over the whole text, then over each passage.

    The heading belongs to every passage.
    """
    if not len(body):
        return np.tile(table[heading].sum(axis=0), (2, 1))
    starts = np.arange(0, len(body), PASSAGE_WORDS // 2)
    halves = np.add.reduceat(table[body], starts, axis=0)
    passages = halves[:-1] + halves[1:] if len(halves) > 1 else halves
    sums: Floats = np.vstack((halves.sum(axis=0), passages)) + table[heading].sum(axis=0)
    return sums


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = np.divide(vectors, np.where(length > 0, length, 1), dtype=np.float32)
    return unit
