"""Chooses the items of the next statement of a lane: its limits, and fairness between users."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from service.errors import DeadlineExceeded
from service.store.append.request import Append, Key

MAX_BATCH_MESSAGES = 512
"""Messages in one statement, up to the item that exceeds it."""
MAX_BATCH_BYTES = 512 * 1024
"""Approximate size of the messages in one statement, unless it has one item."""
LARGE_ITEM_BYTES = 256 * 1024
"""Size above which an item runs apart, so that others do not wait for its statement."""
TURN_MESSAGES = 64
"""Messages of one user after which the next user's items follow, in a queue for several batches."""
TURN_BYTES = 64 * 1024
"""Size of a user's messages after which the next user's items follow."""


def in_turns(queue: deque[Append]) -> deque[Append]:
    """Return the queue as it is if it fits one batch, else with the users' items in rotation.

    The items of one user, and so those of a session, stay in order. A user whose turn the last
    batch did not reach is at the head of the queue, and is first again.
    """
    if len(queue) == 1 or not _exceeds_batch(queue):
        return queue
    by_user: dict[str, deque[Append]] = {}
    for item in queue:
        by_user.setdefault(item.key[0], deque()).append(item)
    if len(by_user) == 1:
        return queue
    ordered: deque[Append] = deque()
    waiting = deque(by_user.values())
    while waiting:
        items = waiting.popleft()
        message_count = size_bytes = 0
        while items and message_count < TURN_MESSAGES and size_bytes < TURN_BYTES:
            item = items.popleft()
            ordered.append(item)
            message_count += len(item.pending)
            size_bytes += item.size_bytes
        if items:
            waiting.append(items)
    return ordered


def _exceeds_batch(queue: deque[Append]) -> bool:
    return (
        sum(item.size_bytes for item in queue) > MAX_BATCH_BYTES
        or sum(len(item.pending) for item in queue) > MAX_BATCH_MESSAGES
    )


def take_batch(
    queue: deque[Append],
    now: float,
    *,
    divert: Callable[[Append], bool] | None,
    accepts_large: bool,
) -> tuple[list[Append], list[Append]]:
    """Remove the next batch from a queue, in order, and drop items of cancelled callers.

    Args:
        queue: The queue of a lane.
        now: The time of the event loop's clock. Items whose deadline has passed fail.
        divert: Moves an item to another lane, or returns False. None: every item stays.
        accepts_large: Whether the batch may consist of a large item.

    Returns:
        The batch, and the items that must be put back at the head of the queue because they
        conflict with an item of the batch.
    """
    batch: list[Append] = []
    postponed: list[Append] = []
    groups: dict[Key, list[Append]] = {}
    message_count = size_bytes = 0
    while queue and message_count < MAX_BATCH_MESSAGES:
        item = queue.popleft()
        if item.future.done():
            continue
        if now >= item.deadline:
            item.fail(DeadlineExceeded("the deadline passed before the append was attempted"))
            continue
        group = groups.get(item.key)
        if group is None:
            if divert is not None and divert(item):
                continue
            group = groups[item.key] = []
        item_is_large = item.size_bytes > LARGE_ITEM_BYTES
        exceeds_limit = batch and size_bytes + item.size_bytes > MAX_BATCH_BYTES
        if exceeds_limit or (item_is_large and (batch or not accepts_large)):
            queue.appendleft(item)
            break
        if (group and _collides(group, item)) or (item.run_alone and batch):
            group.append(item)  # The session's later items must not overtake it.
            postponed.append(item)
            continue
        group.append(item)
        batch.append(item)
        message_count += len(item.pending)
        size_bytes += item.size_bytes
        if item.run_alone or item_is_large:
            break
    return batch, postponed


def _collides(group: list[Append], item: Append) -> bool:
    """Return whether an item conflicts with items of its session in the same statement.

    An item that repeats a message id of the group is marked to be looked up first.
    """
    if item.is_conditional or any(other.is_conditional or other.run_alone for other in group):
        return True
    ids = {message.id for other in group for message in other.pending}
    if any(message.id in ids for message in item.pending):
        item.look_up_first = True
        return True
    # A tombstone refuses items with a derived id, and not the others.
    return item.has_derived_id or any(other.has_derived_id for other in group)
