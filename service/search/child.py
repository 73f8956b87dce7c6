"""The child process: the embedded Qdrant and the offline embeddings, which both hold the interpreter while they work.

`python -m service.search.child FD` serves the requests that come over the socket FD, one after the other, and ends when its parent does.
It runs below the parent's priority: indexing must not slow chat down.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.search import wire
from service.search.points import Changes, Point, Question, Refused, SearchDown, Wipe, WrongIndex

if TYPE_CHECKING:
    from wordllama.inference import WordLlamaInference

    from service.search.index import QdrantIndex

NICENESS = 19
LOCK_PATIENCE = 10.0
"""Seconds to wait for an earlier child, whose parent was killed, to let go of the folder."""
_BATCH_CHARACTERS = 65_536
"""Texts embedded at a time: the model pads each to the longest one."""

_ERRORS = {"SearchDown": SearchDown, "Refused": Refused, "WrongIndex": WrongIndex}

Handler = Callable[[Any, bytes], Awaitable[tuple[Any, bytes]]]


class Offline:
    """The offline embeddings: `wordllama`, from the files that its package brings."""

    def __init__(self) -> None:
        self._model: WordLlamaInference | None = None

    async def embed(self, texts: list[str], _blob: bytes) -> tuple[Any, bytes]:
        """Return one vector a text."""
        import numpy as np  # noqa: PLC0415 - the child of an index without these embeddings does not pay for them

        if self._model is None:
            import wordllama  # noqa: PLC0415

            folder = Path(wordllama.__file__).parent
            self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
        model = self._model
        # Texts of like length together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        vectors: list[Any] = [None] * len(texts)
        while order:
            longest = len(texts[order[-1]]) or 1
            size = max(1, _BATCH_CHARACTERS // longest)
            batch, order = order[-size:], order[:-size]
            with np.errstate(all="ignore"):
                made = model.embed([texts[n] for n in batch], norm=True)
            # A text of which the model knows nothing has no direction.
            made = np.nan_to_num(np.asarray(made, dtype="<f4"))
            for n, vector in zip(batch, made, strict=True):
                vectors[n] = vector.tobytes()
        return None, b"".join(vectors)


class Local:
    """The embedded Qdrant, opened by the first request."""

    def __init__(self) -> None:
        self._index: QdrantIndex | None = None

    async def setup(self, given: dict[str, Any], _blob: bytes) -> tuple[Any, bytes]:
        """Open the folder."""
        from qdrant_client import AsyncQdrantClient  # noqa: PLC0415 - as above

        from service.search.index import QdrantIndex  # noqa: PLC0415

        if self._index is None:
            client = await _open(AsyncQdrantClient, given["folder"])
            self._index = QdrantIndex(client, given["alias"], given["dimensions"])
            _relax(client)
        return None, b""

    @property
    def index(self) -> QdrantIndex:
        """The index that was set up."""
        if self._index is None:
            raise SearchDown("the embedded index is not open")
        return self._index

    async def open(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.open`."""
        return await self.index.open(), b""

    async def create(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.create`."""
        name = await self.index.create()
        _relax(self.index._client)  # noqa: SLF001
        return name, b""

    async def live(self, _given: Any, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.live`."""
        return await self.index.live(), b""

    async def publish(self, collection: str, _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.publish`."""
        await self.index.publish(collection)
        return None, b""

    async def write(self, given: dict[str, Any], blob: bytes) -> tuple[Any, bytes]:
        """As `Index.write`."""
        changes = Changes(
            [Wipe(*each) for each in given["wipes"]],
            [Point(*each) for each in given["deletes"]],
            [Point(*each) for each in given["points"]],
            blob,
        )
        await self.index.write(changes, given["building"])
        return None, b""

    async def search(self, given: Sequence[Any], blob: bytes) -> tuple[Any, bytes]:
        """As `Index.search`."""
        return await self.index.search(blob, Question(*given)), b""

    async def count(self, given: Sequence[Any], _blob: bytes) -> tuple[Any, bytes]:
        """As `Index.count`."""
        return await self.index.count(Wipe(*given)), b""


async def _open(kind: Any, folder: str) -> Any:
    give_up = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return kind(path=folder)
        except RuntimeError as error:
            # Another child has it: one that is just ending, or one of a server that runs.
            if time.monotonic() > give_up:
                raise SearchDown(f"another process has the embedded index open ({folder})") from error
            await asyncio.sleep(0.1)


def _relax(client: Any) -> None:
    """Spare the embedded index a flush to the disk for every point: all of it can be built again from PostgreSQL.

    A process that is killed loses nothing by this; a machine that loses its power may (`chat-history reindex`).
    """
    for collection in getattr(getattr(client, "_client", None), "collections", {}).values():
        storage = getattr(getattr(collection, "storage", None), "storage", None)
        if storage is not None:
            storage.execute("PRAGMA synchronous = OFF")


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
        "embed": offline.embed, "setup": local.setup, "open": local.open, "create": local.create, "live": local.live,
        "publish": local.publish, "write": local.write, "search": local.search, "count": local.count,
    }  # fmt: skip
    with suppress(EOFError, ConnectionError):
        while True:
            header_size, blob_size = wire.lengths(_receive(connection, wire.HEAD_BYTES))
            frame = wire.decode(_receive(connection, header_size), _receive(connection, blob_size))
            number, operation, given = frame.header
            try:
                result, blob = await handlers[operation](given, frame.blob)
                answer = wire.encode([number, None, result], blob)
            except Exception as error:  # noqa: BLE001 - the parent decides what it means
                name = type(error).__name__
                words = str(error) if name in _ERRORS else f"{operation} failed in the child process ({name})"
                answer = wire.encode([number, name, words])
            connection.sendall(answer)


def main() -> None:
    """Serve the parent."""
    # The parent ends us, by closing the socket: a Ctrl-C goes to both, and what is under way is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        asyncio.run(serve(connection))
    # Nothing is left to flush, and tearing the libraries down takes longer than all of this.
    os._exit(0)


if __name__ == "__main__":
    main()
