"""Marks of the history: which pairs of them show a restore."""

from __future__ import annotations

import pytest

from service.store.history_mark import Mark, follows_declaration, is_index_ahead, is_restore

KNOWN = Mark("a", 7)


@pytest.mark.parametrize(
    ("stored", "is_a_restore", "is_declared"),
    [
        (Mark("a", 7), False, False),
        (Mark("a", 8), False, False),
        (Mark("a", 6), True, False),
        (Mark("b", 6), True, False),
        (Mark("b", 7), True, False),
        (Mark("b", 8), False, True),
    ],
)
def test_stored_mark_is_compared_with_a_known_one(
    stored: Mark, is_a_restore: bool, is_declared: bool
) -> None:
    assert is_restore(KNOWN, stored) is is_a_restore
    assert follows_declaration(KNOWN, stored) is is_declared


@pytest.mark.parametrize(
    ("index_mark", "is_ahead"),
    [
        (Mark("a", 6), False),
        (Mark("a", 7), False),
        (Mark("a", 8), True),
        (Mark("b", 6), True),
        (Mark("b", 8), True),
    ],
)
def test_index_is_ahead_with_a_greater_counter_or_another_epoch(
    index_mark: Mark, is_ahead: bool
) -> None:
    assert is_index_ahead(index_mark, KNOWN) is is_ahead
