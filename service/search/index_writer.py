"""Writes to the index: pauses while it accepts none, and reports when it is full.

An index may answer searches and accept no writes, for example when its disk is full. Then search
stays available, and only the indexer waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from service.search.types import (
    Changes,
    IndexFull,
    IndexingStats,
    Point,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    VectorIndex,
)
from service.store.db.retries import backoff

PAUSE_BASE_S, PAUSE_CAP_S = 0.5, 60.0
"""First and longest pause after failed writes to an index that answers searches."""

_log = structlog.get_logger(__name__)


class WriteFailed(SearchUnavailable):
    """The index has not applied a write."""


class IndexWriter:
    """Writes the changes of one indexer."""

    def __init__(self, index: VectorIndex, stats: IndexingStats) -> None:
        self._index = index
        self._stats = stats
        self.failed_count = 0
        """Failed writes since the last one that succeeded."""

    async def write(self, changes: Changes, building: str | None) -> Sequence[Point]:
        """Write changes, as `VectorIndex.write` does.

        Returns:
            The new points for which the index has no room.

        Raises:
            WriteFailed: the index does not respond, or accepts no writes.
            SearchOverloaded: it accepts no more requests at the moment.
            InputRejected: it rejects a point.
        """
        refused: Sequence[Point] = ()
        try:
            await self._index.write(changes, building)
        except IndexFull as error:
            refused = error.refused
        except SearchOverloaded:
            raise
        except SearchUnavailable as error:
            raise WriteFailed(str(error)) from error
        if self.failed_count:
            _log.info("the search index accepts writes again", failed_writes=self.failed_count)
            self.failed_count = 0
        self._report_room()
        return refused

    async def is_searchable(self) -> bool:
        """Return whether the index answers, so that searches work although a write has failed."""
        try:
            return await self._index.open()
        except (SearchUnavailable, SearchMisconfigured):
            return False

    async def pause(self, problem: str) -> None:
        """Wait after a failed write: longer after each one, until a write succeeds.

        Commits do not end the pause, since a full disk stays full whatever is committed.
        """
        self.failed_count += 1
        if self.failed_count == 1:
            _log.warning("the search index accepts no writes", problem=problem)
        await asyncio.sleep(
            PAUSE_BASE_S + backoff(self.failed_count, base_s=PAUSE_BASE_S, cap_s=PAUSE_CAP_S)
        )

    def _report_room(self) -> None:
        """Log when the index has become full, and when it has room again."""
        if self._index.is_full == self._stats.is_full:
            return
        self._stats.is_full = self._index.is_full
        if self._stats.is_full:
            _log.warning("the search index is full", points=self._index.max_points)
        else:
            _log.info("the search index has room again", points=self._index.max_points)
