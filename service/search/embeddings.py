"""Embeddings: vectors of texts (32-bit floats, little-endian), computed offline or remotely."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from service.search.types import (
    FLOAT_BYTES,
    InputRejected,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    TextBlocked,
    pack_vector,
)
from service.search.worker.parent import SearchProcess

OFFLINE_MODEL = "wordllama-l2-supercat"
_PROBE_TEXT = "how long is a vector?"
_TOO_MANY_REQUESTS = 429
_INPUT_ERRORS = (400, 413, 422)
_MAX_TEXT_CHARS = 8_192
"""Characters of a text that are reranked, equal to the characters that are indexed."""
_MAX_TOTAL_CHARS = 262_144
"""Characters of all texts of one rerank, which take about a tenth of a second."""
_MAX_PART_CHARS = 131_072
"""Characters of the texts that are embedded in one request."""
_MAX_REMOTE_PART_TEXTS = 32
"""Texts of one request to an endpoint, whose reply has about 20 bytes for each number."""


class Embeddings(Protocol):
    """A source of vectors."""

    model: str
    """Part of the index's name, because vectors of two models cannot be compared."""
    has_reranker: bool
    """Whether `rerank` returns scores."""

    async def dimensions(self) -> int:
        """Return the number of dimensions of a vector.

        Raises:
            SearchUnavailable: the model does not respond.
            SearchMisconfigured: the number differs from the configured one.
        """

    async def embed(self, texts: Sequence[str]) -> bytes:
        """Return the texts' vectors, concatenated.

        Raises:
            SearchUnavailable: the model does not respond.
            InputRejected: it rejects at least one of the texts.
        """

    async def embed_query(self, query: str) -> bytes:
        """Return the vector of a query, for which a caller waits.

        Raises:
            SearchUnavailable, InputRejected: as `embed`.
        """

    async def rerank(self, query: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:
        """Return the rerank score of each text, 0 to 1, or None to keep the order by vectors.

        Args:
            texts: Pairs of a document's title and the text.

        Raises:
            SearchUnavailable, InputRejected: as `embed`.
        """

    async def close(self) -> None:
        """Close the connections to the model, or the search process."""


class OfflineEmbeddings:
    """Embeddings that need no network, computed in the search process."""

    model = OFFLINE_MODEL
    has_reranker = True

    def __init__(self, process: SearchProcess) -> None:
        self._process = process

    async def dimensions(self) -> int:
        # This also loads the model, so that the first search does not wait for it.
        return int((await self._process.call("dimensions"))[0])

    async def embed(self, texts: Sequence[str]) -> bytes:
        # In parts, so that a query waits for one part at most, and a part fits into a frame.
        return b"".join([await self._embed(part) for part in _parts(texts)])

    async def embed_query(self, query: str) -> bytes:
        return await self._embed([query], is_query=True)

    async def _embed(self, texts: Sequence[str], *, is_query: bool = False) -> bytes:
        return (await self._process.call("embed", texts, is_query=is_query))[1]

    async def rerank(self, query: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:
        max_chars = min(_MAX_TEXT_CHARS, _MAX_TOTAL_CHARS // len(texts)) if texts else 0
        truncated = [(title, text[:max_chars]) for title, text in texts]
        try:
            reply, _ = await self._process.call("rerank", (query, truncated), is_query=True)
        except TextBlocked:
            return None
        scores: list[float] | None = reply
        return scores

    async def close(self) -> None:
        await self._process.close()


def _parts(texts: Sequence[str], max_texts: int = sys.maxsize) -> Iterator[Sequence[str]]:
    """Split texts into parts of up to _MAX_PART_CHARS; a longer text is a part of its own."""
    start = part_chars = 0
    for end, text in enumerate(texts):
        is_full = end - start == max_texts or part_chars + len(text) > _MAX_PART_CHARS
        if end > start and is_full:
            yield texts[start:end]
            start, part_chars = end, 0
        part_chars += len(text)
    if texts:
        yield texts[start:]


def _packed(numbers: Sequence[float]) -> bytes:
    if not math.isfinite(sum(numbers)):
        raise ValueError("a vector has a number that is not finite")
    return pack_vector(numbers)


class _EndpointFailed(SearchUnavailable):
    """The endpoint replied with an error, or not in time. Its texts may be the cause."""


def _error_of_status(status: int) -> Exception:
    if status in _INPUT_ERRORS:
        return InputRejected(f"the embeddings endpoint refuses the text (HTTP {status})")
    error_class = SearchOverloaded if status == _TOO_MANY_REQUESTS else _EndpointFailed
    return error_class(f"the embeddings endpoint answers HTTP {status}")


class RemoteEmbeddings:
    """Embeddings of an OpenAI-compatible endpoint."""

    has_reranker = False

    def __init__(
        self, url: str, model: str, api_key: str | None, dimensions: int | None, timeout_s: float
    ) -> None:
        import openai  # noqa: PLC0415 - costs memory where it is not used

        self.model = model
        self._openai = openai
        # The client requires a key, and some endpoints have none.
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=api_key or "none", timeout=timeout_s, max_retries=0
        )
        self._configured_dimensions = dimensions
        self._dimensions: int | None = None

    async def dimensions(self) -> int:
        if self._dimensions is None:
            dimensions = len(await self._probe()) // FLOAT_BYTES
            if self._configured_dimensions not in (None, dimensions):
                raise SearchMisconfigured(
                    f"EMBEDDINGS_DIMENSIONS is {self._configured_dimensions}, and the vectors of "
                    f"{self.model} have {dimensions}: set it to {dimensions}, or unset it"
                )
            self._dimensions = dimensions
        return self._dimensions

    async def _probe(self) -> bytes:
        try:
            return await self._request([_PROBE_TEXT])
        except InputRejected as error:  # It rejects every text.
            raise SearchUnavailable(str(error)) from error

    async def embed(self, texts: Sequence[str]) -> bytes:
        # In parts, since the conversion of a reply holds the event loop.
        parts = _parts(texts, max_texts=_MAX_REMOTE_PART_TEXTS)
        return b"".join([await self._embed(part) for part in parts])

    async def _embed(self, texts: Sequence[str]) -> bytes:
        try:
            return await self._request(texts)
        except _EndpointFailed as error:
            # An endpoint that embeds another text fails because of these texts.
            await self._probe()
            if len(texts) > 1:
                raise InputRejected(str(error)) from None
        try:
            return await self._request(texts)
        except _EndpointFailed as error:
            raise InputRejected(str(error)) from None

    async def _request(self, texts: Sequence[str]) -> bytes:
        try:
            reply = await self._client.embeddings.create(model=self.model, input=list(texts))
        except self._openai.APIStatusError as error:
            raise _error_of_status(error.status_code) from error
        except self._openai.APITimeoutError as error:
            raise _EndpointFailed("the embeddings endpoint does not reply in time") from error
        except self._openai.OpenAIError as error:
            raise SearchUnavailable(
                f"the embeddings endpoint does not respond ({type(error).__name__})"
            ) from error
        try:
            # The protocol identifies vectors by `index` and guarantees no order.
            by_index = sorted(reply.data, key=lambda item: item.index)
            vectors = [_packed(item.embedding) for item in by_index]
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _EndpointFailed("the embeddings endpoint returned a malformed vector") from error
        sizes = {len(vector) for vector in vectors}
        if self._dimensions is not None:
            sizes.add(self._dimensions * FLOAT_BYTES)
        if len(vectors) != len(texts) or len(sizes) > 1:
            raise _EndpointFailed(
                "the embeddings endpoint did not return one vector of the same length for each text"
            )
        return b"".join(vectors)

    async def embed_query(self, query: str) -> bytes:
        return await self.embed([query])

    async def rerank(self, query: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:  # noqa: ARG002
        return None

    async def close(self) -> None:
        await self._client.close()
