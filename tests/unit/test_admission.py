"""Admission under load: which calls are admitted, and how long rejected callers back off."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Overloaded, Unavailable
from service.rpc import backoff as backoff_module
from service.rpc.admission import Admission
from service.rpc.backoff import RejectionBackoff


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


def test_other_users_are_admitted_after_one_user_filled_the_limit() -> None:
    admission = Admission(100)
    while enters(admission, "flood"):
        pass
    assert sum(enters(admission, "other") for _ in range(10)) == 10
    assert enters(admission, "third")
    assert not enters(admission, "flood")


def test_many_users_with_one_call_each_are_bounded_by_the_hard_limit() -> None:
    admission = Admission(100)
    assert sum(enters(admission, f"{n}") for n in range(1000)) == 125


def test_a_finished_call_makes_room_for_another() -> None:
    admission = Admission(2)
    assert enters(admission, "a")
    assert enters(admission, "a")
    assert not enters(admission, "a")
    admission.leave("a")
    assert enters(admission, "a")
    for _ in range(2):
        admission.leave("a")
    assert (admission.in_flight, admission._counts) == (0, {})


def test_no_call_is_admitted_while_draining() -> None:
    admission = Admission(2)
    admission.is_draining = True
    with pytest.raises(Unavailable):
        admission.enter("a")


@given(
    st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=200)
)
def test_counts_match_the_calls_in_flight_after_any_sequence(
    limit: int, steps: list[tuple[bool, str]]
) -> None:
    admission = Admission(limit)
    in_flight: Counter[str] = Counter()
    for is_entering, owner_id in steps:
        if is_entering:
            is_alone = not in_flight or set(in_flight) == {owner_id}
            is_admitted = enters(admission, owner_id)
            if is_alone:
                assert is_admitted == (in_flight[owner_id] < limit)
            in_flight[owner_id] += is_admitted
        elif in_flight[owner_id]:
            admission.leave(owner_id)
            in_flight[owner_id] -= 1
        in_flight += Counter()
        assert admission.in_flight == in_flight.total() <= admission.hard_limit
        assert admission._counts == in_flight


def test_backoff_grows_with_the_rate_of_rejections(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    backoff = RejectionBackoff()
    shortest, longest = backoff_module.MIN_RETRY_AFTER_S, backoff_module.MAX_RETRY_AFTER_S
    frequent = 20 * backoff_module.FREQUENT_REJECTIONS_PER_S

    def reject(count: int) -> float:
        """Reject `count` calls within the next second; return the longest delay."""
        nonlocal now
        now += 1
        return max(backoff.next_delay_s() for _ in range(count))

    assert 0 < reject(1) < 2 * shortest
    delays = [reject(frequent) for _ in range(20)]
    assert delays[-1] > longest
    assert max(delays) <= 1.5 * longest
    assert [reject(1) for _ in range(20)][-1] < 2 * shortest
    assert len({backoff.next_delay_s() for _ in range(100)}) > 50, "jitter spreads the retries"
