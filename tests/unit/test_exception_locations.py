"""The description of an exception in the log: its locations and causes, bounded."""

from __future__ import annotations

import re

import pytest

from service.telemetry.exceptions import MAX_EXCEPTIONS, MAX_FRAMES, locations


def fail(depth: int = 0) -> None:
    if depth:
        fail(depth - 1)
    raise ValueError("secret")


def failure(depth: int = 0) -> ValueError:
    with pytest.raises(ValueError, match="secret") as caught:
        fail(depth)
    return caught.value


def test_locations_name_file_line_and_function_and_nothing_else() -> None:
    lines = locations(failure())
    assert lines
    assert all(re.fullmatch(r"test_exception_locations\.py:\d+ \w+", line) for line in lines)
    assert lines[-1].endswith(" fail")


def test_innermost_locations_of_a_deep_recursion_are_kept() -> None:
    lines = locations(failure(depth=200))
    assert len(lines) == MAX_FRAMES
    assert lines[0].endswith(" fail")


def test_chain_of_causes_is_named_up_to_its_limit() -> None:
    first = error = failure()
    for _ in range(20):
        error.__cause__ = failure()
        error = error.__cause__
    error.__cause__ = first  # Also a cycle ends.
    lines = locations(first)
    assert lines.count("caused by ValueError") == MAX_EXCEPTIONS - 1


def test_suppressed_context_is_not_named() -> None:
    shown, hidden = failure(), failure()
    shown.__context__, hidden.__context__ = KeyError("secret"), KeyError("secret")
    hidden.__suppress_context__ = True
    assert "caused by KeyError" in locations(shown)
    assert "caused by KeyError" not in locations(hidden)
