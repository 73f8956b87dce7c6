"""Search as the rest of the service sees it: opens what is configured, keeps it open, indexes, and answers questions.

Chat does not depend on it: whatever is down is opened again in the background, and only search calls are told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from service.config import Settings
from service.errors import InvalidArgument, Unavailable
from service.search.embeddings import Embeddings, OfflineEmbeddings, RemoteEmbeddings
from service.search.indexer import Indexer
from service.search.rebuild import Rebuild
from service.search.types import (
    IndexingStats,
    InputRejected,
    PointKind,
    ScoredPoint,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    VectorIndex,
    VectorQuery,
    alias_name,
)
from service.search.worker.parent import SearchProcess, SearchProcessIndex
from service.store.db.database import DATABASE_ERRORS, Database, backoff
from service.store.outbox.outbox import Outbox
from service.store.outbox.reindex_state import RebuildProgress, ReindexState

STEADY = 30.0
"""Seconds that search must have been up for its next fall to be a new one: else the pauses go on growing."""
PROBE_CAP = 5.0
"""Seconds between two tries to open what is down, at the most."""
REPLY_MARGIN = 0.1
"""Seconds before its deadline at which a search is given up, so that the answer arrives."""

_log = structlog.get_logger(__name__)


class Search:
    """Search of one server process."""

    is_enabled = True

    def __init__(
        self, settings: Settings, database: Database, wait_ready: Callable[[], Awaitable[None]]
    ) -> None:
        self._settings = settings
        self._database = database
        self._wait_ready = wait_ready
        self.indexes_messages = settings.index_messages
        """Whether messages are indexed, beside documents."""
        self.is_healthy = False
        """Whether the index answers, by the latest evidence."""
        self.problem = "not asked yet"
        self.on_change: Callable[[], None] = lambda: None
        """Called when `healthy` changes."""
        self.dimensions: int | None = None
        """How long a vector is, once that is known."""
        self._process: SearchProcess | None = None
        self._embeddings: Embeddings | None = None
        self._index: VectorIndex | None = None
        self._alias = ""
        self._indexer: Indexer | None = None
        self._down = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._rebuild: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open everything in the background."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def stop(self) -> None:
        """Stop indexing, and let go of everything."""
        for task in (self._supervisor, self._rebuild):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        if self._indexer is not None:
            await self._indexer.stop()
        for part in (self._index, self._embeddings, self._process):
            if part is not None:
                await part.close()

    def wake(self) -> None:
        """Note that something was committed that the index owes."""
        if self._indexer is not None:
            self._indexer.wake()

    @property
    def stats(self) -> IndexingStats:
        """What is owed, and what was done."""
        return self._indexer.stats if self._indexer is not None else IndexingStats()

    # -- opening -------------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Open, and open again whenever something was down."""
        await self._wait_ready()
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            try:
                await self._open()
                opened = loop.time()
                await self._down.wait()
                if loop.time() - opened > STEADY:
                    attempt = 0
            except (SearchUnavailable, SearchMisconfigured) as error:
                self._mark_down(str(error))
            except DATABASE_ERRORS as error:
                self._mark_down(f"the database does not answer ({type(error).__name__})")
            except Exception as error:  # noqa: BLE001 - chat goes on, whatever is wrong here
                _log.error("search cannot be opened", error=type(error).__name__, exc_info=True)
                self._mark_down(f"search cannot be opened ({type(error).__name__})")
            attempt += 1
            await asyncio.sleep(0.2 + backoff(attempt, base=0.2, cap=PROBE_CAP))

    async def _open(self) -> None:
        self._down.clear()
        if self._indexer is not None:
            await self._indexer.stop()
        index = await self._connect()
        there = await index.open()
        if self._indexer is None:
            assert self._embeddings is not None  # noqa: S101 - `_connect` has made it
            self._indexer = Indexer(
                self._database,
                index,
                self._embeddings,
                self._alias,
                dimensions=self.dimensions or 0,
                messages=self.indexes_messages,
                on_down=self._mark_down,
            )
            await Outbox(self._database).retry_failed()
        progress = await ReindexState(self._database, self._alias).progress()
        if not there or progress is None or progress.collection is not None:
            # The first start, an index that was lost, or a rebuilding that was left unfinished.
            self._start_rebuild(anew=False)
        if there:
            self._mark_up()

    async def _connect(self) -> VectorIndex:
        """Make the clients once; return the index."""
        settings = self._settings
        offline = settings.embeddings_url is None
        if self._embeddings is None:
            local = settings.qdrant_url is None
            if offline or local:
                self._process = SearchProcess()
            self._embeddings = (
                self._remote_embeddings() if not offline else OfflineEmbeddings(self._need_child())
            )
        if self._index is None:
            self.dimensions = await self._embeddings.dimensions()
            self._alias = alias_name(
                settings.qdrant_collection, self._embeddings.model, self.dimensions
            )
            self._index = self._make_index(self.dimensions)
        return self._index

    def _need_child(self) -> SearchProcess:
        assert self._process is not None  # noqa: S101 - made where it is needed
        return self._process

    def _remote_embeddings(self) -> RemoteEmbeddings:
        settings = self._settings
        key = settings.embeddings_api_key
        return RemoteEmbeddings(
            settings.embeddings_url or "",
            settings.embeddings_model or "",
            key.get_secret_value() if key else None,
            settings.embeddings_dimensions,
            settings.search_timeout,
        )

    def _make_index(self, dimensions: int) -> VectorIndex:
        settings = self._settings
        if settings.qdrant_url is None:
            child = self._need_child()
            child.setup = {
                "folder": str(settings.data_dir / "qdrant"),
                "alias": self._alias,
                "dimensions": dimensions,
            }
            return SearchProcessIndex(child)
        # Imported here: with the embedded index only the child pays for it.
        from service.search.qdrant import QdrantIndex, remote  # noqa: PLC0415

        key = settings.qdrant_api_key
        client = remote(
            settings.qdrant_url,
            key.get_secret_value() if key else None,
            transport=settings.qdrant_transport,
            grpc_port=settings.qdrant_grpc_port,
            timeout=settings.search_timeout,
        )
        return QdrantIndex(client, self._alias, dimensions, settings.search_timeout)

    def _mark_up(self) -> None:
        if self._indexer is not None:
            self._indexer.start()
        if not self.is_healthy:
            _log.info("search is ready", index=self._alias)
            self.is_healthy, self.problem = True, ""
            self.on_change()

    def _mark_down(self, problem: str) -> None:
        if self.is_healthy or problem != self.problem:
            _log.warning("search is not available", problem=problem)
        changed = self.is_healthy
        self.is_healthy, self.problem = False, problem
        self._down.set()
        if changed:
            self.on_change()

    # -- rebuilding ----------------------------------------------------------------------------------------------------

    def _start_rebuild(self, *, anew: bool) -> None:
        if self._rebuild is None or self._rebuild.done():
            self._rebuild = asyncio.get_running_loop().create_task(self._run_rebuild(anew=anew))

    async def _run_rebuild(self, *, anew: bool) -> None:
        assert self._index is not None  # noqa: S101 - the caller has seen it
        work = Rebuild(
            self._database,
            self._index,
            self._alias,
            messages=self.indexes_messages,
            wake=self._wake_or_start,
        )
        attempt = 0
        while True:
            try:
                await work.run(anew=anew)
                return
            except Exception as error:  # noqa: BLE001 - it must be built, whatever is in the way now
                attempt += 1
                known = isinstance(error, (SearchUnavailable, *DATABASE_ERRORS))
                _log.warning(
                    "building the search index pauses",
                    problem=type(error).__name__,
                    exc_info=not known,
                )
                await asyncio.sleep(0.5 + backoff(attempt, base=0.5, cap=30.0))

    def _wake_or_start(self) -> None:
        """Have the collection, which is there by now, filled."""
        if not self.is_healthy and not self._down.is_set():
            self._mark_up()
        self.wake()

    async def rebuild(self) -> AsyncIterator[RebuildProgress]:
        """Build the index anew, or follow the work that is under way; a caller that goes away does not stop it.

        Raises:
            Unavailable: the index does not answer (SEARCH_UNAVAILABLE).
        """
        if not self.is_healthy:
            raise self._unavailable()
        state = ReindexState(self._database, self._alias)
        before = await state.progress()
        if before is None or before.collection is None:
            self._start_rebuild(anew=True)
        while True:
            work = self._rebuild
            progress = await state.progress()
            running = work is not None and not work.done()
            if progress is not None and (progress.collection is not None or not running):
                yield progress
            if (work is None or work.done()) and (progress is None or progress.collection is None):
                return
            await asyncio.sleep(0.3)

    # -- questions -----------------------------------------------------------------------------------------------------

    async def search_chunks(
        self,
        owners: Sequence[str],
        query: str | bytes,
        documents: Sequence[str],
        limit: int,
        deadline: float,
    ) -> list[ScoredPoint]:
        """Find the chunks nearest to a query, or to a vector.

        Raises:
            Unavailable: the index does not answer (SEARCH_UNAVAILABLE).
            InvalidArgument: the query cannot be embedded, or the vector has another dimension.
        """
        return await self._find(
            query, VectorQuery(PointKind.CHUNK, owners, documents, limit), deadline
        )

    async def rerank(
        self, query: str, texts: Sequence[tuple[str, str]], deadline: float
    ) -> list[float] | None:
        """Return how near each text, given after its document's title, is to a query; None: as near as its vector is.

        Raises:
            As `search_chunks`.
        """
        if self._embeddings is None:
            raise self._unavailable()
        async with self._answering(deadline):
            return await self._embeddings.rerank(query, texts)

    async def search_messages(
        self, user_id: str, query: str, session_id: str, limit: int, deadline: float
    ) -> list[ScoredPoint]:
        """Find the messages nearest to a query.

        Raises:
            As `search_chunks`.
        """
        sessions = [session_id] if session_id else []
        return await self._find(
            query, VectorQuery(PointKind.MESSAGE, [user_id], sessions, limit), deadline
        )

    async def _find(
        self, query: str | bytes, question: VectorQuery, deadline: float
    ) -> list[ScoredPoint]:
        index, embeddings = self._index, self._embeddings
        if not self.is_healthy or index is None or embeddings is None:
            raise self._unavailable()
        if isinstance(query, bytes) and len(query) != (self.dimensions or 0) * 4:
            raise InvalidArgument.field(
                "vector", f"must have the index's dimension, {self.dimensions}"
            )
        async with self._answering(deadline):
            vector = query if isinstance(query, bytes) else await embeddings.embed([query])
            return await index.search(vector, question)

    @asynccontextmanager
    async def _answering(self, deadline: float) -> AsyncIterator[None]:
        """Turn what goes wrong into what a caller is told."""
        limit = min(
            deadline - REPLY_MARGIN,
            asyncio.get_running_loop().time() + self._settings.search_timeout,
        )
        try:
            async with asyncio.timeout_at(limit):
                yield
        except (SearchOverloaded, TimeoutError):
            raise self._unavailable() from None
        except SearchUnavailable as error:
            self._mark_down(str(error))
            raise self._unavailable() from None
        except InputRejected:
            raise InvalidArgument.field("query", "cannot be embedded") from None

    @staticmethod
    def _unavailable() -> Unavailable:
        return Unavailable(
            "search does not answer now; try again", reason="SEARCH_UNAVAILABLE", retry_after=1.0
        )
