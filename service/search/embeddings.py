"""Embeddings: from texts to vectors (32-bit floats, little-endian), behind one small interface."""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from service.search.types import (
    InputRejected,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
)
from service.search.worker.parent import SearchProcess

_TOO_MANY_REQUESTS = 429
OFFLINE_MODEL = "wordllama-l2-supercat"
_MAX_TEXT = 8_192
"""Characters of a text that are compared with a question, as of one that is indexed."""
_MAX_TEXTS = 262_144
"""Characters of all of them: a tenth of a second."""


class Embeddings(Protocol):
    """Makes vectors."""

    model: str
    """Goes into the index's name: vectors of two models cannot be compared."""

    async def dimensions(self) -> int:
        """Return how long a vector is.

        Raises:
            SearchDown: it cannot be asked now.
            WrongIndex: it is not what is configured.
        """

    async def embed(self, texts: Sequence[str]) -> bytes:
        """Return the texts' vectors, one after the other.

        Raises:
            SearchDown: it does not answer.
            Refused: it does not take one of them.
        """

    async def rerank(self, question: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:
        """Return how near each text, given after its document's title, is to a question, 0 to 1; None: as near as their vectors are.

        Raises:
            SearchDown, Refused: as `embed`.
        """

    async def close(self) -> None:
        """Let go of everything."""


class OfflineEmbeddings:
    """The embeddings that need no network, in the child process."""

    model = OFFLINE_MODEL

    def __init__(self, child: SearchProcess) -> None:
        self._process = child

    async def dimensions(self) -> int:
        # Loads the model, too, for which no search should have to wait.
        return len(await self.embed(["how long is a vector?"])) // 4

    async def embed(self, texts: Sequence[str]) -> bytes:
        return (await self._process.call("embed", texts))[1]

    async def rerank(self, question: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:
        room = min(_MAX_TEXT, _MAX_TEXTS // len(texts)) if texts else 0
        found: list[float] | None = (
            await self._process.call("rerank", (question, [(t, s[:room]) for t, s in texts]))
        )[0]
        return found

    async def close(self) -> None:
        await self._process.close()


class RemoteEmbeddings:
    """The embeddings of any OpenAI-compatible endpoint."""

    def __init__(
        self, url: str, model: str, api_key: str | None, dimensions: int | None, timeout: float
    ) -> None:
        import openai  # noqa: PLC0415 - costs memory where it is not used

        self.model = model
        self._errors = openai
        # Some endpoints want no key, and the client wants one.
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=0
        )
        self._wanted = dimensions
        self._known: int | None = None

    async def dimensions(self) -> int:
        if self._known is None:
            made = len(await self.embed(["how long is a vector?"])) // 4
            if self._wanted not in (None, made):
                raise SearchMisconfigured(
                    f"EMBEDDINGS_DIMENSIONS is {self._wanted}, and {self.model} makes vectors of {made}"
                )
            self._known = made
        return self._known

    async def embed(self, texts: Sequence[str]) -> bytes:
        try:
            made = await self._client.embeddings.create(model=self.model, input=list(texts))
        except self._errors.APIStatusError as error:
            # A wrong key or model name is the operator's to mend, and nothing that was sent is at fault.
            if error.status_code in (400, 413, 422):
                raise InputRejected(
                    f"the embeddings endpoint refuses it ({error.status_code})"
                ) from error
            kind = (
                SearchOverloaded if error.status_code == _TOO_MANY_REQUESTS else SearchUnavailable
            )
            raise kind(f"the embeddings endpoint answers {error.status_code}") from error
        except self._errors.OpenAIError as error:
            raise SearchUnavailable(
                f"the embeddings endpoint does not answer ({type(error).__name__})"
            ) from error
        vectors = [each.embedding for each in sorted(made.data, key=lambda each: each.index)]
        if len(vectors) != len(texts) or len({len(vector) for vector in vectors}) > 1:
            raise SearchUnavailable("the embeddings endpoint has not answered every text alike")
        return b"".join(map(pack_vector, vectors))

    async def rerank(self, question: str, texts: Sequence[tuple[str, str]]) -> list[float] | None:  # noqa: ARG002
        return None

    async def close(self) -> None:
        await self._client.close()


def pack_vector(numbers: Iterable[float]) -> bytes:
    """Return numbers as 32-bit floats, little-endian."""
    made = array.array("f", numbers)
    if sys.byteorder == "big":
        made.byteswap()
    return made.tobytes()
