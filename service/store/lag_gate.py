"""Bounds the age of what a replica returns, by the counter of the history's epoch.

This process raises the counter on the primary (`epoch.py`), and remembers when. A replica that
shows a value has replayed everything that was committed before that value was stored. The row is
read in the transaction of the data, on the server that returns them, so that the bound holds behind
a pooler or an endpoint of several replicas. It also holds for logical replication.

PostgreSQL's own functions do not suffice. The age of the last replayed transaction grows on an idle
primary, and depends on two clocks. The positions in the log are equal while the replica receives
nothing, and positions of two timelines after a failover cannot be compared.

A replica of another history, such as one that was not restored together with the primary, shows
another epoch.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.epoch import EpochKeeper
from service.store.history_mark import Mark
from service.store.tables import history_epoch

RAISES_PER_BOUND = 4
"""Raises of the counter, at most, in the time of the bound, that reads of the replica cause."""
MARKS_PER_BOUND = 16
"""Marks that are remembered, at most, for the time of the bound: the indexer raises the counter
much more often."""
REMEMBERED_BOUNDS = 4
"""Multiple of the bound for which a mark is remembered, at least under load."""

_READ = sa.select(
    sa.cast(history_epoch.c.epoch, sa.Text()).label("epoch"), history_epoch.c.counter
).where(history_epoch.c.id == 1)


class ReplicaBehind(Exception):
    """The replica lacks changes that a read must show, or holds another history."""


class LagGate:
    """Decides whether the data of a replica is fresh enough."""

    def __init__(self, keeper: EpochKeeper, max_lag_s: float) -> None:
        """Take the epoch of the primary, and the bound in seconds."""
        self.lag_s = 0.0
        """Age of the oldest mark that the replica did not show at its last read: at least for this
        time it lags. 0 if it showed all."""
        self._keeper = keeper
        self._max_lag_s = max_lag_s
        self._loop = asyncio.get_running_loop()
        # The counter, and the loop's time before it was stored. Both rise.
        self._marks: deque[tuple[int, float]] = deque(maxlen=MARKS_PER_BOUND * REMEMBERED_BOUNDS)
        self._requested_at = -math.inf
        keeper.on_raised = self._add
        keeper.on_restored.append(self._marks.clear)

    async def check(self, connection: AsyncConnection) -> None:
        """Check that everything older than the bound is visible on the server of a connection.

        Args:
            connection: The connection, in the transaction that reads the data.

        Raises:
            ReplicaBehind: it is not, or that cannot be known yet.
        """
        self._request_mark()
        row = (await connection.execute(_READ)).one_or_none()
        known, now = self._keeper.mark, self._loop.time()
        if row is None or known is None or row.epoch != known.epoch:
            raise ReplicaBehind
        visible_at, self.lag_s = -math.inf, 0.0
        for counter, stored_at in self._marks:
            if counter > row.counter:
                self.lag_s = now - stored_at
                break
            visible_at = stored_at
        if visible_at < now - self._max_lag_s:
            raise ReplicaBehind

    def _request_mark(self) -> None:
        """Raise the counter in the background, so that the next reads can know more."""
        due_at = self._loop.time() - self._max_lag_s / RAISES_PER_BOUND
        newest_at = self._marks[-1][1] if self._marks else -math.inf
        if newest_at <= due_at and self._requested_at <= due_at:
            self._requested_at = self._loop.time()
            self._keeper.raise_soon()

    def _add(self, mark: Mark, stored_at: float) -> None:
        known = self._keeper.mark
        if known is None or mark.epoch != known.epoch:
            return  # Another history has replaced its own since.
        if self._marks:
            counter, newest_at = self._marks[-1]
            # Raises overlap. One that is left out makes the replica look older, never newer.
            is_too_early = stored_at < newest_at + self._max_lag_s / MARKS_PER_BOUND
            if is_too_early or mark.counter <= counter:
                return
        self._marks.append((mark.counter, stored_at))
