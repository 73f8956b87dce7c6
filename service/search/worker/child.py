"""The search process: the embedded Qdrant and the offline embeddings.

`python -m service.search.worker.child FD BEATS` serves the requests that arrive on the socket FD,
one at a time, and exits when its parent does. A thread returns the bytes that arrive on the socket
BEATS. It is a process of its own because Qdrant's local mode and the embeddings hold the
interpreter lock while they work. It runs at a lower priority, so that indexing does not slow
chat down.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import pickle
import signal
import socket
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from service.search.worker import framing, heartbeat
from service.store.history_mark import Mark
from service.telemetry.logs import configure_logging

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from qdrant_client import AsyncQdrantClient
    from wordllama.inference import WordLlamaInference

    from service.search.qdrant import QdrantIndex

NICENESS = 10
"""Leaves nine tenths of a processor to the server where both want it. With the lowest priority (19)
a search of one text waited for seconds behind batch jobs of the same machine."""
OOM_SCORE = 500
"""Makes the kernel end this process rather than the server when memory runs out (-1000 to 1000)."""
MAX_CPU_S = 10.0
"""Processor time of one request to the embeddings. The longest ones use about a second."""
OUT_OF_MEMORY = errno.ENOMEM
"""Exit code after a failed allocation: a new process has its memory again."""
FAILED_DELETE = errno.EIO
"""Exit code after a failed delete by a filter. In memory the points are deleted, so that a second
attempt would find none, and they would stay in the file."""
LOCK_TIMEOUT_S = 10.0
"""Time to wait for the folder's lock while the search process of a killed server exits."""
_BATCH_CHARS = 65_536
"""Characters that are tokenized at a time; each word takes about a hundred bytes of memory."""

_DAMAGED = (ValueError, EOFError, KeyError, pickle.UnpicklingError, sqlite3.DatabaseError)
"""Errors that reading an index with a truncated file raises."""
_WARNINGS = (
    "Payload indexes have no effect in the local Qdrant",
    "Local mode is not recommended for collections",
)
"""Warnings of qdrant-client about local mode; docs/how-to/search.md states these limits."""

Reply = tuple[Any, bytes]
"""A result that can be encoded as JSON, and raw bytes."""
Handler = Callable[[Any, bytes], Awaitable[Reply]]

# Both classes import their packages late, so that a process that needs only one saves memory.


class OfflineModel:
    """The offline embeddings: `wordllama`, with the model files of its package."""

    def __init__(self) -> None:
        self._model: WordLlamaInference | None = None

    async def dimensions(self, _argument: Any, _blob: bytes) -> Reply:
        """Load the model, and return the number of dimensions of its vectors."""
        model = self._model = self._model or _load_model()
        return int(model.embedding.shape[1]), b""

    async def embed(self, texts: list[str], _blob: bytes) -> Reply:
        """Return one vector of length 1 for each text: the mean of its words' vectors."""
        import numpy as np  # noqa: PLC0415

        # A text without a word that the model knows has the zero vector.
        vectors = [
            (total / (np.linalg.norm(total) or 1.0)).astype("<f4").tobytes()
            for batch in _batches(texts)
            for total in self._word_sums(batch)
        ]
        return None, b"".join(vectors)

    async def rerank(self, argument: tuple[str, list[tuple[str, str]]], _blob: bytes) -> Reply:
        """Implement `Embeddings.rerank`."""
        import numpy as np  # noqa: PLC0415

        from service.search import rerank  # noqa: PLC0415

        query, texts = argument
        return rerank.scores(
            query, texts, lambda words: np.stack(list(self._word_sums(words)))
        ), b""

    def _word_sums(self, texts: list[str]) -> Iterator[NDArray[np.float32]]:
        """Yield the sum of the word vectors of each text.

        The model's own method pads every text to the longest of its batch and computes on the
        padding. This takes half the time.
        """
        model = self._model = self._model or _load_model()
        for encoded in model.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield model.embedding.take(encoded.ids, axis=0, mode="clip").sum(axis=0)


def _load_model() -> WordLlamaInference:
    import wordllama  # noqa: PLC0415

    model = wordllama.WordLlama.load(
        cache_dir=Path(wordllama.__file__).parent, disable_download=True
    )
    model.tokenizer.no_padding()
    return model


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Split texts into batches of up to _BATCH_CHARS; a longer text is a batch of its own."""
    batch: list[str] = []
    free_chars = _BATCH_CHARS
    for text in texts:
        if batch and len(text) > free_chars:
            yield batch
            batch, free_chars = [], _BATCH_CHARS
        batch.append(text)
        free_chars -= len(text)
    if batch:
        yield batch


class LocalIndex:
    """The embedded Qdrant. Its methods are those of `VectorIndex`, called through frames."""

    def __init__(self) -> None:
        self._client: AsyncQdrantClient | None = None
        self._index: QdrantIndex | None = None
        self._max_points = 0
        self._is_full = False

    async def setup(self, argument: dict[str, Any], _blob: bytes) -> Reply:
        """Open the folder, once; return where a damaged folder was moved, if one was.

        Raises:
            SearchMisconfigured: the installed qdrant-client does not fit.
            SearchUnavailable: another process has the folder open.
        """
        from service.search.qdrant import QdrantIndex  # noqa: PLC0415
        from service.search.worker import qdrant_local, qdrant_memory  # noqa: PLC0415

        if self._index is not None:
            return None, b""
        folder = Path(argument["folder"])
        qdrant_local.check_package(folder.parent)
        max_points: int = argument["max_points"]
        qdrant_memory.install(max_points)
        client, moved_to = await _open(folder)
        try:
            qdrant_local.patch_collections(client, max_points)
        except SearchMisconfigured:
            # Otherwise the next attempt would find the folder locked by this process.
            await client.close()
            raise
        self._client, self._max_points = client, max_points
        self._index = QdrantIndex(client, argument["alias"], argument["dimensions"])
        return moved_to, b""

    @property
    def index(self) -> QdrantIndex:
        """The index that `setup` opened."""
        if self._index is None:
            raise SearchUnavailable("the embedded index is not open")
        return self._index

    async def open(self, _argument: Any, _blob: bytes) -> Reply:
        return await self.index.open(), b""

    async def create_collection(self, mark: Sequence[Any] | None, _blob: bytes) -> Reply:
        from service.search.worker import qdrant_local  # noqa: PLC0415

        name = await self.index.create_collection(_decode_mark(mark))
        assert self._client is not None  # noqa: S101 - set together with the index
        qdrant_local.patch_collections(self._client, self._max_points)
        return name, b""

    async def live_collection(self, _argument: Any, _blob: bytes) -> Reply:
        return await self.index.live_collection(), b""

    async def has_collection(self, collection: str, _blob: bytes) -> Reply:
        return await self.index.has_collection(collection), b""

    async def read_mark(self, collection: str | None, _blob: bytes) -> Reply:
        return await self.index.read_mark(collection), b""

    async def publish(self, collection: str, _blob: bytes) -> Reply:
        await self.index.publish(collection)
        # The collection that was dropped refers to itself, and holds its vectors until then.
        gc.collect()
        return None, b""

    async def write(self, argument: dict[str, Any], blob: bytes) -> Reply:
        changes = Changes(
            [PointFilter(*fields) for fields in argument["delete_filters"]],
            [Point(*fields) for fields in argument["deletes"]],
            [Point(*fields) for fields in argument["upserts"]],
            blob,
            _decode_mark(argument["mark"]),
        )
        try:
            try:
                refused, is_full = await self._apply(changes, argument["building"])
            finally:
                # Also after a failure: the changes before it are valid and already in memory.
                self._commit(purge_deleted=bool(changes.delete_filters or changes.deletes))
        except sqlite3.OperationalError as error:
            if changes.delete_filters:
                os._exit(FAILED_DELETE)
            # Its messages are fixed texts, such as "database or disk is full".
            raise SearchUnavailable(f"the embedded index cannot be written: {error}") from error
        return (refused, is_full), b""

    async def _apply(self, changes: Changes, building: str | None) -> tuple[list[int], bool]:
        """Apply changes; return the indexes of upserts without room, and whether it is full."""
        from service.search.worker import qdrant_local  # noqa: PLC0415

        if changes.delete_filters or changes.deletes:
            # First, since they make room.
            await self.index.write(changes._replace(upserts=(), vectors=b""), building)
        if not changes.upserts:
            return [], self._is_full
        assert self._client is not None  # noqa: S101 - set together with the index
        names = {building, await self.index.live_collection()}
        ids = [point.id for point in changes.upserts]
        refused_ids, self._is_full = qdrant_local.find_room(
            self._client, names, ids, was_full=self._is_full
        )
        accepted = [n for n, point_id in enumerate(ids) if point_id not in refused_ids]
        if accepted:
            await self.index.write(changes.upserts_only(accepted), building)
        return sorted(set(range(len(ids))) - set(accepted)), self._is_full

    def _commit(self, *, purge_deleted: bool) -> None:
        from service.search.worker import qdrant_local  # noqa: PLC0415

        if self._client is not None:
            qdrant_local.commit(self._client, purge_deleted=purge_deleted)

    async def search(self, argument: Sequence[Any], blob: bytes) -> Reply:
        return await self.index.search(blob, VectorQuery(*argument)), b""

    async def count(self, argument: Sequence[Any], _blob: bytes) -> Reply:
        return await self.index.count(PointFilter(*argument)), b""


def _decode_mark(fields: Sequence[Any] | None) -> Mark | None:
    return None if fields is None else Mark(*fields)


async def _open(folder: Path) -> tuple[AsyncQdrantClient, str | None]:
    """Open the folder; return the client, and where a damaged folder was moved, if one was."""
    from qdrant_client import AsyncQdrantClient  # noqa: PLC0415

    deadline = time.monotonic() + LOCK_TIMEOUT_S
    moved_to: str | None = None
    while True:
        try:
            return AsyncQdrantClient(path=str(folder)), moved_to
        except _DAMAGED as error:
            # An empty folder makes the service rebuild the index from PostgreSQL.
            if isinstance(error, sqlite3.OperationalError) or moved_to is not None:
                raise
            moved_to = _move_damaged(folder)
        except RuntimeError as error:
            # Another search process holds the lock: it is about to exit, or its server runs.
            if time.monotonic() > deadline:
                raise SearchUnavailable(
                    f"another process has the embedded index open ({folder}): stop it, or give "
                    "this server another CHAT_HISTORY_DATA_DIR, or set QDRANT_URL"
                ) from error
            await asyncio.sleep(0.1)


def _move_damaged(folder: Path) -> str:
    """Rename a damaged folder, unless a process has it open, and return its new path.

    Raises:
        OSError: a process has it open.
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
    """Answer requests until the parent closes the socket.

    Nothing else runs on this event loop, so that blocking reads do no harm.
    """
    handlers = _handlers()
    with suppress(EOFError, ConnectionError):
        while True:
            header_bytes, blob_bytes = framing.decode_lengths(
                _receive(connection, framing.PREFIX_BYTES)
            )
            frame = framing.decode(
                _receive(connection, header_bytes), _receive(connection, blob_bytes)
            )
            connection.sendall(await _answer(handlers, frame))


def _handlers() -> dict[str, Handler]:
    model, index = OfflineModel(), LocalIndex()
    methods: list[Handler] = [model.dimensions, model.embed, model.rerank]
    methods += [index.setup, index.open]
    methods += [index.create_collection, index.live_collection, index.has_collection]
    methods += [index.read_mark, index.publish, index.write]
    methods += [index.search, index.count]
    return {method.__name__: method for method in methods}


@contextmanager
def _cpu_limit(operation: str) -> Iterator[None]:
    """End the process by SIGPROF when an operation on texts uses more than MAX_CPU_S.

    Processor time shows a text without end earlier than the reply timeout of the parent, which must
    allow for a machine so busy that this process hardly runs.
    """
    if operation not in framing.EMBEDDING_OPERATIONS:
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


async def _answer(handlers: dict[str, Handler], frame: framing.Frame) -> bytes:
    number, operation, argument = frame.header
    try:
        with _cpu_limit(operation):
            result, blob = await handlers[operation](argument, frame.blob)
        return framing.encode([number, None, result], blob)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - the parent raises it again
        if operation in framing.EMBEDDING_OPERATIONS and isinstance(
            error, (ValueError, TypeError, OverflowError)
        ):
            # The text causes these errors, so that a retry cannot succeed.
            error = InputRejected("the model refuses the text")
        name = type(error).__name__
        is_known = name in framing.ERRORS
        message = str(error) if is_known else f"{operation} failed in the search process ({name})"
        return framing.encode([number, name, message])


def main() -> None:
    """Serve the parent process."""
    # The parent ends this process by closing the socket. Ctrl-C signals both processes, and the
    # request in progress must finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("warning", "auto")  # Reports of libraries may hold text of users.
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message, UserWarning)
    with suppress(OSError):
        os.nice(NICENESS)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    beats = socket.socket(fileno=int(sys.argv[2]))
    threading.Thread(target=heartbeat.answer, args=[beats], daemon=True).start()
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            asyncio.run(serve(connection))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    # Every write is committed already, and unloading the libraries takes longer than all else here.
    os._exit(0)


if __name__ == "__main__":
    main()
