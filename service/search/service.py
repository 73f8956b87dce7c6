"""`Search`: opens the configured index, keeps it open and up to date, and answers queries.

Chat does not depend on it. An index that becomes unavailable is opened again in the background, and
only the search RPCs report it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from service.config import Settings
from service.errors import InvalidArgument, Unavailable
from service.search import backends
from service.search.embeddings import Embeddings
from service.search.indexer import Indexer
from service.search.query_queue import QueryQueue
from service.search.rebuild import Rebuild, is_ahead
from service.search.types import (
    FLOAT_BYTES,
    IndexingStats,
    InputRejected,
    PointKind,
    QueryStats,
    ScoredPoint,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    VectorIndex,
    VectorQuery,
    alias_name,
)
from service.search.worker.parent import SearchProcess
from service.store.db.database import Database
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.retries import backoff
from service.store.epoch import EpochKeeper
from service.store.outbox.index_source import MAX_TEXT_CHARS
from service.store.outbox.outbox import Outbox
from service.store.outbox.reindex_state import RebuildProgress, ReindexState

STABLE_AFTER_S = 30.0
"""Uptime after which the back-off starts again at its first delay."""
OPEN_BACKOFF_CAP_S = 5.0
"""Longest back-off between two attempts to open search."""
REPLY_MARGIN_S = 0.1
"""A query times out this long before its deadline, so that the error reply still arrives."""
PROGRESS_POLL_S = 0.3
"""Time between two reads of a rebuild's progress."""

_log = structlog.get_logger(__name__)


class Search:
    """Search of one server process."""

    is_enabled = True

    def __init__(
        self,
        settings: Settings,
        database: Database,
        epoch: EpochKeeper,
        wait_ready: Callable[[], Awaitable[None]],
    ) -> None:
        """Prepare search; `start` opens it.

        Args:
            settings: The settings.
            database: The database.
            epoch: The epoch of the database's history.
            wait_ready: Returns when the database is ready.
        """
        self.indexes_messages = settings.index_messages
        """Whether messages are indexed, in addition to documents."""
        self.is_healthy = False
        """Whether the index responded to the latest request."""
        self.problem = "search has not been opened yet"
        """Why the index is not healthy; empty while it is."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `is_healthy` changes."""
        self.dimensions: int | None = None
        """Dimensions of a vector, once known."""
        self._settings = settings
        self._database = database
        self._epoch = epoch
        epoch.on_restored.append(self._rebuild_if_ahead)
        self._wait_ready = wait_ready
        self.queries = QueryQueue(backends.query_limits(settings))
        """The queries that run and wait."""
        self._process: SearchProcess | None = None
        self._embeddings: Embeddings | None = None
        self._index: VectorIndex | None = None
        self._alias = ""
        self._indexer: Indexer | None = None
        self._down = asyncio.Event()
        self._supervisor_task: asyncio.Task[None] | None = None
        self._rebuild_task: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Open search in the background."""
        self._supervisor_task = asyncio.get_running_loop().create_task(self._supervise())

    async def stop(self) -> None:
        """Stop indexing and close everything."""
        self._is_stopping = True
        for task in (self._supervisor_task, self._rebuild_task):
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
        """Wake the indexer after a commit that enqueued a change."""
        if self._indexer is not None:
            self._indexer.wake()

    @property
    def stats(self) -> IndexingStats:
        """The indexer's figures."""
        return self._indexer.stats if self._indexer is not None else IndexingStats()

    @property
    def query_stats(self) -> QueryStats:
        """The figures of queries and of the search process."""
        restart_count = self._process.restart_count if self._process is not None else 0
        return QueryStats(self.queries.waiting_count, self.queries.rejected_count, restart_count)

    # -- opening -----------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Open search, and open it again whenever it becomes unavailable."""
        await self._wait_ready()
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            try:
                await self._open()
                opened_at = loop.time()
                await self._down.wait()
                if loop.time() - opened_at > STABLE_AFTER_S:
                    attempt = 0
            except (SearchUnavailable, SearchMisconfigured) as error:
                self._mark_down(str(error))
            except DATABASE_ERRORS as error:
                self._mark_down(f"the database does not respond ({type(error).__name__})")
            except Exception as error:  # noqa: BLE001 - chat continues in any case
                _log.error("search cannot be opened", error=type(error).__name__, exc_info=True)
                self._mark_down(f"search cannot be opened ({type(error).__name__})")
            attempt += 1
            await asyncio.sleep(0.2 + backoff(attempt, base_s=0.2, cap_s=OPEN_BACKOFF_CAP_S))

    async def _open(self) -> None:
        self._down.clear()
        if self._indexer is not None:
            await self._indexer.stop()
        embeddings, index = await self._connect()
        has_collection = await index.open()
        if self._indexer is None:
            self._indexer = Indexer(
                self._database,
                self._epoch,
                index,
                embeddings,
                self._alias,
                dimensions=self.dimensions or 0,
                indexes_messages=self.indexes_messages,
                on_down=self._mark_down,
                on_ahead=self._rebuild_if_ahead,
            )
            await Outbox(self._database).retry_failed()
        progress = await ReindexState(self._database, self._alias).progress()
        is_unbuilt = not has_collection or progress is None or progress.collection is not None
        if is_unbuilt or await is_ahead(index, self._epoch):
            # This is the first start, or the index was lost, or a rebuild is unfinished, or the
            # database was restored.
            self._start_rebuild(force=False)
        if has_collection:
            self._mark_up()

    async def _connect(self) -> tuple[Embeddings, VectorIndex]:
        """Return the embeddings and the index; create them at the first call."""
        settings = self._settings
        if self._embeddings is None:
            if backends.needs_search_process(settings):
                self._process = SearchProcess()
                self._process.on_unresponsive = self._note_unresponsive_process
            self._embeddings = backends.create_embeddings(settings, self._process)
        # Each time: with a Qdrant server, only this asks whether the search process responds.
        dimensions = await self._embeddings.dimensions()
        if self._index is None:
            self.dimensions = dimensions
            self._alias = alias_name(
                settings.qdrant_collection, self._embeddings.model, self.dimensions
            )
            self._index = backends.create_index(
                settings, self._process, self._alias, self.dimensions
            )
        return self._embeddings, self._index

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
        was_healthy = self.is_healthy
        self.is_healthy, self.problem = False, problem
        self._down.set()
        if was_healthy:
            self.on_change()

    def _note_unresponsive_process(self) -> None:
        if self.is_healthy:
            self._mark_down("the search process does not respond")

    # -- rebuilding --------------------------------------------------------------------------------

    def _rebuild_if_ahead(self) -> None:
        """Rebuild the index if it may hold what the database has lost by a restore."""
        if self._indexer is not None:
            self._start_rebuild(force=False)

    def _start_rebuild(self, *, force: bool) -> None:
        is_running = self._rebuild_task is not None and not self._rebuild_task.done()
        if is_running or self._is_stopping:
            return
        assert self._index is not None  # noqa: S101 - callers run after `_open`
        rebuild = Rebuild(
            self._database,
            self._epoch,
            self._index,
            self._alias,
            indexes_messages=self.indexes_messages,
            wake=self._wake_or_start,
        )
        self._rebuild_task = asyncio.get_running_loop().create_task(
            rebuild.run_until_built(force=force)
        )

    def _wake_or_start(self) -> None:
        """Wake the indexer; start it if the rebuild has just created the first collection."""
        if not self.is_healthy and not self._down.is_set():
            self._mark_up()
        self.wake()

    async def rebuild(self) -> AsyncIterator[RebuildProgress]:
        """Rebuild the index and report the progress, or follow a rebuild that runs already.

        A rebuild continues when its caller disconnects.

        Raises:
            Unavailable: the index does not respond (SEARCH_UNAVAILABLE).
        """
        if not self.is_healthy:
            raise self._unavailable()
        state = ReindexState(self._database, self._alias)
        progress = await state.progress()
        if progress is None or progress.collection is None:
            self._start_rebuild(force=True)
        while True:
            task = self._rebuild_task
            progress = await state.progress()
            runs_here = task is not None and not task.done()
            # True also if another process runs it.
            runs_anywhere = progress is not None and progress.collection is not None
            if progress is not None and (runs_anywhere or not runs_here):
                yield progress
            if not runs_here and not runs_anywhere:
                return
            await asyncio.sleep(PROGRESS_POLL_S)

    # -- queries -----------------------------------------------------------------------------------

    async def search_chunks(
        self,
        owner_ids: Sequence[str],
        query: str | bytes,
        document_ids: Sequence[str],
        limit: int,
        deadline: float,
    ) -> list[ScoredPoint]:
        """Return the chunks nearest to a query text or to a vector.

        Args:
            owner_ids: Owners whose documents are searched; the user who searches comes first.
            query: The text, or a vector as 32-bit floats, little-endian.
            document_ids: Documents to search. Empty for all.
            limit: Maximum number of chunks.
            deadline: Deadline of the call on the event loop's clock.

        Raises:
            Unavailable: the index does not respond (SEARCH_UNAVAILABLE).
            Overloaded: too many queries are waiting.
            InvalidArgument: the query cannot be embedded, or the vector has another dimension.
        """
        vector_query = VectorQuery(PointKind.CHUNK, owner_ids, document_ids, limit)
        return await self._search(owner_ids[0], query, vector_query, deadline)

    async def search_messages(
        self, user_id: str, query: str, session_id: str, limit: int, deadline: float
    ) -> list[ScoredPoint]:
        """Return a user's messages nearest to a query text.

        Args:
            user_id: The user.
            query: The text.
            session_id: Session to search. Empty for all.
            limit: Maximum number of messages.
            deadline: Deadline of the call on the event loop's clock.

        Raises:
            As `search_chunks`.
        """
        session_ids = [session_id] if session_id else []
        vector_query = VectorQuery(PointKind.MESSAGE, [user_id], session_ids, limit)
        return await self._search(user_id, query, vector_query, deadline)

    async def rerank(
        self, owner_id: str, query: str, texts: Sequence[tuple[str, str]], deadline: float
    ) -> list[float] | None:
        """Return the rerank score of each text, 0 to 1, or None to keep the order by vectors.

        Args:
            owner_id: The user who searches.
            query: The query text.
            texts: Pairs of a document's title and the text.
            deadline: Deadline of the call on the event loop's clock.

        Raises:
            As `search_chunks`.
        """
        if self._embeddings is None:
            raise self._unavailable()
        if not self._embeddings.has_reranker:
            return None
        n_bytes = sum(len(title) + min(len(text), MAX_TEXT_CHARS) for title, text in texts)
        timeout_at = self._timeout_at(deadline)
        async with (
            self.queries.admitted(owner_id, n_bytes, timeout_at, has_started=True),
            self._translating_errors(timeout_at),
        ):
            return await self._embeddings.rerank(query, texts)

    async def _search(
        self, owner_id: str, query: str | bytes, vector_query: VectorQuery, deadline: float
    ) -> list[ScoredPoint]:
        index, embeddings = self._index, self._embeddings
        if not self.is_healthy or index is None or embeddings is None:
            raise self._unavailable()
        if isinstance(query, bytes) and len(query) != (self.dimensions or 0) * FLOAT_BYTES:
            raise InvalidArgument.field(
                "vector", f"must have the index's dimension, {self.dimensions}"
            )
        timeout_at = self._timeout_at(deadline)
        async with (
            self.queries.admitted(owner_id, len(query), timeout_at),
            self._translating_errors(timeout_at),
        ):
            vector = query if isinstance(query, bytes) else await embeddings.embed_query(query)
            hits = await index.search(vector, vector_query)
        self._epoch.look()
        return hits

    def _timeout_at(self, deadline: float) -> float:
        """Return when a query of a call with this deadline times out."""
        now = asyncio.get_running_loop().time()
        return min(deadline - REPLY_MARGIN_S, now + self._settings.search_timeout)

    @asynccontextmanager
    async def _translating_errors(self, timeout_at: float) -> AsyncIterator[None]:
        """Limit the time of a query, and translate the errors of search into service errors."""
        try:
            async with asyncio.timeout_at(timeout_at):
                yield
        except (SearchOverloaded, TimeoutError):
            # Neither is evidence that the index is down.
            raise self._unavailable() from None
        except SearchUnavailable as error:
            self._mark_down(str(error))
            raise self._unavailable() from None
        except InputRejected:
            raise InvalidArgument.field("query", "cannot be embedded") from None

    @staticmethod
    def _unavailable() -> Unavailable:
        return Unavailable(
            "search does not respond now; try again", reason="SEARCH_UNAVAILABLE", retry_after=1.0
        )
