"""`Heartbeat`: notices a search process that does not run, also while no request waits for it.

A thread of the search process returns each byte that the serving process sends. A process that
computes does so too, since its threads take turns; a stopped or frozen one does not.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

INTERVAL_S = 2.5
"""Time between two bytes. Each one wakes both processes, also while the service is idle."""
SUSPECT_AFTER = 2
"""Bytes in a row without a reply after which the process counts as unresponsive: 5 s."""
DEAD_AFTER = 6
"""Bytes in a row without a reply after which the process is ended: 15 s.

It runs at the lowest priority. On a busy machine it may have to wait for seconds.
"""


class Heartbeat:
    """Sends bytes to one search process, and counts those that it has not returned."""

    def __init__(self, connection: socket.socket, on_missed: Callable[[int], None]) -> None:
        """Start to send.

        Args:
            connection: The serving process's end; it is closed by `close`.
            on_missed: Called with the number of bytes in a row that were not returned in time.
        """
        self._connection = connection
        self._connection.setblocking(False)
        self._on_missed = on_missed
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop sending and close the connection."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._connection.close()

    async def _run(self) -> None:
        has_started = False
        missed_count = 0
        with suppress(OSError):  # The process has ended, which its other connection reports.
            while True:
                self._connection.send(b".")
                await asyncio.sleep(INTERVAL_S)
                # Read after the pause, not awaited: if this event loop was held for longer, the
                # reply has arrived all the same.
                if self._is_answered():
                    has_started = True
                    missed_count = 0
                elif has_started:
                    missed_count += 1
                    self._on_missed(missed_count)

    def _is_answered(self) -> bool:
        """Read the replies.

        Raises:
            ConnectionError: the process has closed its end.
        """
        try:
            replies = self._connection.recv(64)
        except BlockingIOError:
            return False
        if not replies:
            raise ConnectionResetError
        return True


def answer(connection: socket.socket) -> None:
    """Return each byte until the serving process closes its end; runs in the search process."""
    with suppress(OSError, MemoryError):
        while received := connection.recv(64):
            connection.sendall(received)
