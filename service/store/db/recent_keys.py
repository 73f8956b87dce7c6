"""`RecentKeys`: a bounded set that forgets the key that was added first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

MAX_KEYS = 4096


class RecentKeys:
    """A set of the keys that were added last."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def add(self, key: Hashable) -> None:
        """Add a key, or make it the newest one."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._max_keys:
            self._keys.popitem(last=False)

    def discard(self, key: Hashable) -> None:
        """Remove a key if it is in the set."""
        self._keys.pop(key, None)
