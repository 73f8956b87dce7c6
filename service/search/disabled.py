"""`SearchDisabled`, which replaces `Search` where `CHAT_HISTORY_SEARCH=off`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from service.errors import FailedPrecondition
from service.search.types import IndexingStats, QueryStats, ScoredPoint
from service.store.outbox.reindex_state import RebuildProgress

if TYPE_CHECKING:
    from service.search.service import Search


class SearchDisabled:
    """Search without an index: no change is enqueued, and every query raises SEARCH_DISABLED.

    Importing this module loads neither the index's client nor the embeddings.
    """

    is_enabled = False
    indexes_messages = False
    is_healthy = False
    dimensions: int | None = None

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.stats = IndexingStats()
        self.query_stats = QueryStats()

    def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    def wake(self) -> None:
        """Do nothing."""

    def rebuild(self) -> AsyncIterator[RebuildProgress]:
        """Raise FailedPrecondition (SEARCH_DISABLED)."""
        self._raise_disabled()

    async def search_chunks(self, *_query: object) -> list[ScoredPoint]:
        """Raise FailedPrecondition (SEARCH_DISABLED)."""
        self._raise_disabled()

    async def search_messages(self, *_query: object) -> list[ScoredPoint]:
        """Raise FailedPrecondition (SEARCH_DISABLED)."""
        self._raise_disabled()

    async def rerank(self, *_query: object) -> list[float] | None:
        """Raise FailedPrecondition (SEARCH_DISABLED)."""
        self._raise_disabled()

    def _raise_disabled(self) -> NoReturn:
        raise FailedPrecondition(
            "search is disabled on this server: CHAT_HISTORY_SEARCH is off",
            reason="SEARCH_DISABLED",
        )


AnySearch: TypeAlias = "Search | SearchDisabled"
"""The search of a server process, enabled or not."""
