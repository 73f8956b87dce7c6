"""Conversion of large JSON values without holding the event loop.

A conversion of many values pauses after every STEP_VALUES of them. `pause` is a turnstile: only one
conversion passes after each PAUSE_TURNS of the loop, in rotation between users, so that many large
conversions delay other calls no more than one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

from chathistory.v1 import message_pb2
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from service.errors import DeadlineExceeded
from service.rpc import convert
from service.store.db.fair_semaphore import AcquireTimeout, FairSemaphore
from service.store.rows import MessageRow

T = TypeVar("T")

STEP_VALUES = 2_000
"""JSON values converted between two pauses: one to two milliseconds of work."""
ROW_VALUES = 10
"""Values that take as long as a message without any."""
LONG_VALUE_CHARACTERS = 256
"""Characters of JSON that count as one more value."""
THREAD_VALUES = 20_000
"""A single message with more JSON values is converted in a thread. Only messages that were stored
before `convert_structs.MAX_VALUES` became a limit have that number of values."""
PAUSE_TURNS = 16
"""Turns of the loop between two steps: a small call takes about that many until its reply. With a
step in each turn, it would wait for as many steps. An idle loop makes them in 0.1 milliseconds."""
MAX_PAUSE_S = 0.005
"""Seconds after which the next step starts in any case: a busy loop is shared equally."""
PAUSE_REQUEST_BYTES = 8 * 1024
"""Bytes of a request's messages with parts or metadata that are converted between two pauses."""
PAUSE_PARTS = 500
"""Parts of a request's messages that are converted between two pauses."""


def count_values(json_text: str | None) -> int:
    """Return an upper bound of the number of values in a JSON text; 0 for None.

    Numbers of hundreds of digits count as two.
    """
    if json_text is None:
        return 0
    values = json_text.count(",") + json_text.count("[") + json_text.count("{")
    return values + len(json_text) // LONG_VALUE_CHARACTERS


class ConversionTurns:
    """Lets the large conversions of a server take turns."""

    def __init__(self) -> None:
        self._turnstile = FairSemaphore(1)
        self._loop = asyncio.get_running_loop()

    async def pause(self, owner_id: str, deadline: float) -> None:
        """Let the loop run its other tasks, and wait for the conversions of other users.

        Args:
            owner_id: The user for whom the conversion runs.
            deadline: When the call ends, on the loop's clock.

        Raises:
            DeadlineExceeded: the deadline passed while other conversions had their turn.
        """
        try:
            async with self._turnstile.hold(owner_id, deadline - self._loop.time()):
                closes_at = self._loop.time() + MAX_PAUSE_S
                for _ in range(PAUSE_TURNS):
                    await asyncio.sleep(0)
                    if self._loop.time() > closes_at:
                        break
        except AcquireTimeout:
            raise _deadline_exceeded() from None

    async def message(
        self, row: MessageRow, session_id: str, owner_id: str, deadline: float
    ) -> message_pb2.Message:
        """Return the resource of a message's row; arguments as in `add_messages`."""
        value_count = count_values(row.parts) + count_values(row.metadata)
        if value_count > THREAD_VALUES:
            return await self._run_in_thread(
                owner_id, deadline, lambda: convert.message(row, session_id)
            )
        if value_count > STEP_VALUES:
            await self.pause(owner_id, deadline)
        return convert.message(row, session_id)

    async def add_messages(
        self,
        rows: Iterable[MessageRow],
        session_id: str,
        messages: RepeatedCompositeFieldContainer[message_pb2.Message],
        owner_id: str,
        deadline: float,
    ) -> None:
        """Add the resources of messages' rows to a reply.

        Args:
            rows: The rows.
            session_id: The session of the messages.
            messages: The reply's field.
            owner_id: The user for whom the call runs.
            deadline: When the call ends, on the loop's clock.

        Raises:
            DeadlineExceeded: as `pause`.
        """
        remaining_values = STEP_VALUES
        for row in rows:
            value_count = ROW_VALUES
            if row.parts is not None or row.metadata is not None:
                value_count += count_values(row.parts) + count_values(row.metadata)
            remaining_values -= value_count
            if remaining_values < 0:
                remaining_values = STEP_VALUES - value_count
                if value_count > THREAD_VALUES:
                    messages.append(await self.message(row, session_id, owner_id, deadline))
                    continue
                await self.pause(owner_id, deadline)
            convert.message(row, session_id, messages.add)

    async def _run_in_thread(self, owner_id: str, deadline: float, work: Callable[[], T]) -> T:
        """Run work in a thread while no other large conversion runs."""
        try:
            async with self._turnstile.hold(owner_id, deadline - self._loop.time()):
                future = self._loop.run_in_executor(None, work)
                try:
                    return await asyncio.shield(future)
                except asyncio.CancelledError:
                    # A thread cannot be cancelled. Cancelled calls must not start more of them.
                    await asyncio.wait((future,))
                    raise
        except AcquireTimeout:
            raise _deadline_exceeded() from None


def _deadline_exceeded() -> DeadlineExceeded:
    return DeadlineExceeded("the call's time was up before its messages were converted")
