"""Who is let in when all is full, and when those who are not should come again."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Overloaded, Unavailable
from service.rpc import pipeline
from service.rpc.pipeline import Admission


def enters(admission: Admission, owner_id: str) -> bool:
    try:
        admission.enter(owner_id)
    except Overloaded as error:
        if error.retry_after:
            return False
        raise
    return True


def test_one_user_may_fill_the_limit_and_no_more() -> None:
    admission = Admission(100)
    assert sum(enters(admission, "flood") for _ in range(1000)) == 100


def test_who_comes_after_a_flood_is_let_in() -> None:
    admission = Admission(100)
    while enters(admission, "flood"):
        pass
    assert sum(enters(admission, "other") for _ in range(10)) == 10
    assert enters(admission, "third")
    assert not enters(admission, "flood")


def test_many_users_at_once_are_bounded_too() -> None:
    admission = Admission(100)
    assert sum(enters(admission, f"{n}") for n in range(1000)) == 125


def test_what_has_left_makes_room() -> None:
    admission = Admission(2)
    assert enters(admission, "a")
    assert enters(admission, "a")
    assert not enters(admission, "a")
    admission.leave("a")
    assert enters(admission, "a")
    for _ in range(2):
        admission.leave("a")
    assert (admission.in_flight, admission._counts) == (0, {})


def test_nobody_is_let_in_where_all_is_going_away() -> None:
    admission = Admission(2)
    admission.draining = True
    with pytest.raises(Unavailable):
        admission.enter("a")


@given(
    st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=200)
)
def test_the_counts_are_right_whatever_comes_and_goes(
    limit: int, steps: list[tuple[bool, str]]
) -> None:
    admission = Admission(limit)
    inside: Counter[str] = Counter()
    for comes, owner_id in steps:
        if comes:
            alone = not inside or set(inside) == {owner_id}
            let_in = enters(admission, owner_id)
            if alone:
                assert let_in == (inside[owner_id] < limit)
            inside[owner_id] += let_in
        elif inside[owner_id]:
            admission.leave(owner_id)
            inside[owner_id] -= 1
        inside += Counter()
        assert admission.in_flight == inside.total() <= admission.most
        assert admission._counts == inside


def test_the_more_are_refused_the_later_they_are_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    refusals = pipeline._Refusals()

    def second(count: int) -> float:
        """Refuse so many within a second and return the longest pause that was told."""
        nonlocal now
        now += 1
        return max(refusals.pause() for _ in range(count))

    first = second(1)
    assert 0 < first < 2 * pipeline.MIN_PAUSE
    many = [second(20 * pipeline.REFUSALS) for _ in range(20)]
    assert many[-1] > pipeline.MAX_PAUSE
    assert max(many) <= 1.5 * pipeline.MAX_PAUSE
    few = [second(1) for _ in range(20)]
    assert few[-1] < 2 * pipeline.MIN_PAUSE
    assert len({refusals.pause() for _ in range(100)}) > 50, "they do not come together again"
