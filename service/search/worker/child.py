"""The child process: the embedded Qdrant and the offline embeddings, which both hold the interpreter while they work.

`python -m service.search.worker.child FD` serves the requests that come over the socket FD, one after the other, and ends when its parent does.
It runs below the parent's priority: indexing must not slow chat down.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pickle
import signal
import socket
import sqlite3
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.search.types import (
    Changes,
    InputRejected,
    Point,
    PointFilter,
    SearchMisconfigured,
    SearchUnavailable,
    VectorQuery,
)
from service.search.worker import framing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from wordllama.inference import WordLlamaInference

    from service.search.qdrant import QdrantIndex

NICENESS = 19
LOCK_PATIENCE = 10.0
"""Seconds to wait for an earlier child, whose parent was killed, to let go of the folder."""
_BATCH_CHARACTERS = 65_536
"""Texts taken apart at a time: a hundred bytes of memory a word."""

_BROKEN = (ValueError, EOFError, KeyError, pickle.UnpicklingError, sqlite3.DatabaseError)
"""What reading an index raises of which a file was cut off."""
_WARNINGS = (
    "Payload indexes have no effect in the local Qdrant",
    "Local mode is not recommended for collections",
)
"""What qdrant-client says of its embedded mode to programmers; docs/how-to/search.md says it to operators."""

_ERRORS = {
    "SearchUnavailable": SearchUnavailable,
    "InputRejected": InputRejected,
    "SearchMisconfigured": SearchMisconfigured,
}

Handler = Callable[[Any, bytes], Awaitable[tuple[Any, bytes]]]


class Offline:
    """The offline embeddings: `wordllama`, from the files that its package brings."""

    def __init__(self) -> None:
        self._model: WordLlamaInference | None = None

    async def embed(self, texts: list[str], _blob: bytes) -> tuple[Any, bytes]:
        """Return one vector a text: the mean of its words', of length 1."""
        import numpy as np  # noqa: PLC0415 - the child of an index without these embeddings does not pay for them

        # A text of which the model knows nothing has no direction.
        vectors = [
            (total / (np.linalg.norm(total) or 1.0)).astype("<f4").tobytes()
            for batch in _batches(texts)
            for total in self._sums(batch)
        ]
        return None, b"".join(vectors)

    async def rerank(
        self, given: tuple[str, list[tuple[str, str]]], _blob: bytes
    ) -> tuple[Any, bytes]:
        """As `Embeddings.nearness`."""
        import numpy as np  # noqa: PLC0415 - as above

        from service.search import rerank  # noqa: PLC0415 - as above

        question, texts = given
        return rerank.scores(question, texts, lambda words: np.stack(list(self._sums(words)))), b""

    def _sums(self, texts: list[str]) -> Iterator[NDArray[np.float32]]:
        """Give the sum of each text's words' vectors.

        The model's own method pads every text to the longest of its batch and works on the padding; this takes half of its time.
        """
        model = self._model = self._model or _load()
        for encoded in model.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield model.embedding.take(encoded.ids, axis=0, mode="clip").sum(axis=0)


def _load() -> WordLlamaInference:
    import wordllama  # noqa: PLC0415

    model = wordllama.WordLlama.load(
        cache_dir=Path(wordllama.__file__).parent, disable_download=True
    )
    model.tokenizer.no_padding()
    return model


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Cut a list into parts of _BATCH_CHARACTERS, or one text."""
    batch: list[str] = []
    room = _BATCH_CHARACTERS
    for text in texts:
        if batch and len(text) > room:
            yield batch
            batch, room = [], _BATCH_CHARACTERS
        batch.append(text)
        room -= len(text)
    if batch:
        yield batch


class Local:
    """The embedded Qdrant, opened by the first request."""

    def __init__(self) -> None:
        self._client: Any = None
        self._index: QdrantIndex | None = None

    async def setup(self, given: dict[str, Any], _blob: bytes) -> tuple[Any, bytes]:
        """Open the folder; answer where to one that could not be read was moved, if any was."""
        from qdrant_client import AsyncQdrantClient  # noqa: PLC0415 - as above

        from service.search.qdrant import QdrantIndex  # noqa: PLC0415

        if self._index is None:
            self._client, aside = await _open(AsyncQdrantClient, given["folder"])
            self._index = QdrantIndex(self._client, given["alias"], given["dimensions"])
            self._fit()
            return aside, b""
        return None, b""

    def _fit(self) -> None:
        from service.search.worker import qdrant_local  # noqa: PLC0415 - as above

        qdrant_local.fit(self._client)

    def _commit(self, *, erased: bool) -> None:
        from service.search.worker import qdrant_local  # noqa: PLC0415 - as above

        qdrant_local.commit(self._client, erased=erased)

    @property
    def index(self) -> QdrantIndex:
        """The index that was set up."""
        if self._index is None:
            raise SearchUnavailable("the embedded index is not open")
        return self._index

    async def open(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.open`."""
        return await self.index.open(), b""

    async def create_collection(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.create`."""
        name = await self.index.create_collection()
        self._fit()
        return name, b""

    async def live_collection(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.live`."""
        return await self.index.live_collection(), b""

    async def publish(self, collection: str, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.publish`."""
        await self.index.publish(collection)
        return None, b""

    async def write(self, given: dict[str, Any], blob: bytes) -> tuple[Any, bytes]:
        """As `Index.write`."""
        changes = Changes(
            [PointFilter(*each) for each in given["wipes"]],
            [Point(*each) for each in given["deletes"]],
            [Point(*each) for each in given["points"]],
            blob,
        )
        try:
            await self.index.write(changes, given["building"])
        finally:
            # What was done before something failed is in memory already, and right.
            self._commit(erased=bool(changes.wipes or changes.deletes))
        return None, b""

    async def search(self, given: Sequence[Any], blob: bytes) -> tuple[Any, bytes]:
        """As `Index.search`."""
        return await self.index.search(blob, VectorQuery(*given)), b""

    async def count(self, given: Sequence[Any], _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.count`."""
        return await self.index.count(PointFilter(*given)), b""


async def _open(kind: Any, folder: str) -> tuple[Any, str | None]:
    """Open the folder; return the client, and where to a folder that could not be read was moved."""
    give_up = time.monotonic() + LOCK_PATIENCE
    aside: str | None = None
    while True:
        try:
            return kind(path=folder), aside
        except _BROKEN as error:
            # All of it can be built again from PostgreSQL, which begins when nothing is found here.
            if isinstance(error, sqlite3.OperationalError) or aside is not None:
                raise
            aside = _put_aside(Path(folder))
        except RuntimeError as error:
            # Another child has it: one that is just ending, or one of a server that runs.
            if time.monotonic() > give_up:
                raise SearchUnavailable(
                    f"another process has the embedded index open ({folder})"
                ) from error
            await asyncio.sleep(0.1)


def _put_aside(folder: Path) -> str:
    """Move a folder away, unless a process has it open.

    Raises:
        OSError: one has.
    """
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return str(folder.rename(folder.with_name(f"{folder.name}.broken-{time.time_ns():x}")))


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


async def serve(connection: socket.socket) -> None:
    """Answer requests until the parent is gone. There is nothing to do meanwhile, so waiting may block."""
    local, offline = Local(), Offline()
    handlers: dict[str, Handler] = {
        "embed": offline.embed, "rerank": offline.rerank, "setup": local.setup, "open": local.open, "create_collection": local.create_collection, "live_collection": local.live_collection,
        "publish": local.publish, "write": local.write, "search": local.search, "count": local.count,
    }  # fmt: skip
    with suppress(EOFError, ConnectionError):
        while True:
            header_size, blob_size = framing.lengths(_receive(connection, framing.HEAD_BYTES))
            frame = framing.decode(
                _receive(connection, header_size), _receive(connection, blob_size)
            )
            number, operation, given = frame.header
            try:
                result, blob = await handlers[operation](given, frame.blob)
                answer = framing.encode([number, None, result], blob)
            except Exception as error:  # noqa: BLE001 - the parent decides what it means
                name = type(error).__name__
                if operation in framing.OF_TEXTS and isinstance(
                    error, (ValueError, TypeError, OverflowError)
                ):
                    # The text's fault, which another try would not mend.
                    error, name = InputRejected("the model does not take it"), "InputRejected"
                words = (
                    str(error)
                    if name in _ERRORS
                    else f"{operation} failed in the child process ({name})"
                )
                answer = framing.encode([number, name, words])
            connection.sendall(answer)


def main() -> None:
    """Serve the parent."""
    # The parent ends us, by closing the socket: a Ctrl-C goes to both, and what is under way is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message, UserWarning)
    with suppress(OSError):
        os.nice(NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        asyncio.run(serve(connection))
    # Nothing is left to flush, and tearing the libraries down takes longer than all of this.
    os._exit(0)


if __name__ == "__main__":
    main()
