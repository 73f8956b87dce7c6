"""Reranking holds a bounded number of vectors, whatever the texts."""

from __future__ import annotations

import itertools

import numpy as np

from service.search import rerank


def vectors_of(words: list[str]) -> rerank.Floats:
    return np.array([[len(word), ord(word[0]), ord(word[-1])] for word in words], np.float32)


def test_vectors_of_texts_with_many_different_words_are_bounded() -> None:
    counts: list[int] = []

    def vectors(words: list[str]) -> rerank.Floats:
        counts.append(len(words))
        return vectors_of(words)

    words = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4))
    texts = [("title", " ".join(itertools.islice(words, 1_600))) for _ in range(30)]
    texts.append(("needle", "the needle is in the last text"))
    scores = rerank.scores("needle", texts, vectors)
    assert counts == [rerank.MAX_VOCABULARY]
    assert scores is not None
    assert len(scores) == len(texts)
    assert all(0 <= score <= 1 for score in scores)
    assert max(scores) == scores[-1]
