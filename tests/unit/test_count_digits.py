"""The digits that PostgreSQL writes for the numbers of a JSON text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.rpc.convert_structs import count_digits


@pytest.mark.parametrize(
    ("value", "digit_count"),
    [
        ([1e308, -1e-300, 12345.5], 608),
        (10**24, 25),
        ({"a": ["1e+308", '"', '\\"1e+308', "\\", "1" * 30, '\\\\"', "\n\u20ac1e+308"]}, 0),
        ({'1e+308\\": 1e+20, "': 1e25}, 25),
    ],
)
def test_digits_of_numbers_are_counted_and_those_in_strings_are_not(
    value: Any, digit_count: int
) -> None:
    assert count_digits(json.dumps(value)) == digit_count


def test_no_json_has_no_digits() -> None:
    assert count_digits(None) == 0
