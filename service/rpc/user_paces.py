"""The pace of users whose requests are large.

Receiving and parsing such requests takes more time than all that a chat does, even if they are
rejected afterwards.
"""

from __future__ import annotations

PACED_BYTES = 64 * 1024
"""Requests of a user that are larger count for the user's pace."""
USER_BYTES_PER_SECOND = 16 * 1024 * 1024
"""Bytes that a user may send in requests of this size."""
PACE_BURST_S = 0.25
"""Seconds of this pace that a user may be ahead: one request of the greatest size."""
FAILED_BYTES = USER_BYTES_PER_SECOND // 4
"""Bytes for which a request counts that was not received: gRPC may have decompressed megabytes."""


class UserPaces(dict[str, float]):
    """When each user whose request was large, or failed to arrive, may send the next one.

    For as long as a user has an entry, its requests are received one by one. A time is one of the
    event loop's clock.
    """

    def count(self, user_id: str, n_bytes: int, now: float) -> None:
        """Count a large request of a user."""
        earliest = now - PACE_BURST_S
        starts_at = max(self.get(user_id, earliest), earliest)
        self[user_id] = starts_at + n_bytes / USER_BYTES_PER_SECOND

    def forget(self, now: float) -> None:
        """Forget the users who may be ahead by a full burst again."""
        over = [user_id for user_id, starts_at in self.items() if starts_at <= now - PACE_BURST_S]
        for user_id in over:
            del self[user_id]
