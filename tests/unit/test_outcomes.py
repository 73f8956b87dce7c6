"""Outcomes: which half of the database's work counts as working, by calls and by probes."""

from __future__ import annotations

import pytest

from service.store.db.outcomes import (
    FIRST_HOLD_S,
    LOCK_CHECK_INTERVAL_S,
    MAX_HOLD_S,
    WINDOW_S,
    Judge,
    Outcomes,
    Tally,
)
from tests.support.sqlstates import error_of

PROBED = "the database does not answer"
FULL = "the disk is full"
LOCK = "the table chat_messages is locked"


def tally(*, successes: int = 0, failures: int = 0, lock_failures: int = 0) -> Tally:
    outcomes = Tally()
    outcomes.successes, outcomes.failures = successes, failures
    outcomes.lock_failures, outcomes.cause = lock_failures, FULL
    return outcomes


FAILURES = tally(failures=3)
NO_CALLS = tally()


@pytest.fixture
def judge() -> Judge:
    """Provide the judge of a half that works."""
    judge = Judge()
    assert judge.problem
    assert judge.judge("", NO_CALLS, 0.0) == ""
    return judge


# --- Without calls the probe decides.


def test_failing_probe_is_believed_and_its_success_ends_the_outage(judge: Judge) -> None:
    assert judge.judge(PROBED, NO_CALLS, 1.0) == PROBED
    assert judge.judge("another problem", NO_CALLS, 2.0) == "another problem"
    assert judge.judge("", NO_CALLS, 3.0) == ""


def test_failures_of_an_outage_that_a_probe_saw_do_not_prolong_it(judge: Judge) -> None:
    assert judge.judge(PROBED, FAILURES, 1.0) == PROBED
    assert judge.judge(PROBED, FAILURES, 2.0) == PROBED
    assert judge.judge("", FAILURES, 3.0) == ""
    assert judge.judge("", NO_CALLS, 4.0) == ""
    assert judge.judge("", tally(failures=1), 5.0) == "", "those before the recovery do not count"


# --- Calls decide over the probe.


def test_half_works_while_most_calls_succeed_although_probes_fail(judge: Judge) -> None:
    for second in range(1, 10):
        assert judge.judge(PROBED, tally(successes=3, failures=2), second) == ""
    assert judge.judge(PROBED, tally(successes=2, failures=2), 10.0) == PROBED
    assert judge.judge(PROBED, tally(successes=1), 11.0) == ""


def test_few_failures_are_accidents(judge: Judge) -> None:
    assert judge.judge("", tally(failures=2), 1.0) == ""
    assert judge.judge("", tally(failures=2), 1.0 + WINDOW_S + 0.1) == "", "the first is too old"


def test_failures_count_together_over_several_probes(judge: Judge) -> None:
    assert judge.judge("", tally(failures=1), 1.0) == ""
    assert judge.judge("", tally(failures=1), 2.0) == ""
    assert judge.judge("", tally(failures=1), 3.0) == FULL


def test_successes_count_over_several_probes_too(judge: Judge) -> None:
    assert judge.judge("", tally(successes=10, failures=1), 1.0) == ""
    assert judge.judge("", FAILURES, 2.0) == ""


# --- The hold after calls failed although probes succeeded.


def test_half_is_held_down_after_the_last_failure_without_calls(judge: Judge) -> None:
    assert judge.judge("", FAILURES, 1.0) == FULL
    assert judge.judge("", FAILURES, 2.0) == FULL
    assert judge.judge("", NO_CALLS, 2.0 + FIRST_HOLD_S - 0.1) == FULL
    assert judge.judge("", NO_CALLS, 2.0 + FIRST_HOLD_S) == ""


def test_hold_doubles_when_the_failures_come_back(judge: Judge) -> None:
    now, expected_s = 1.0, FIRST_HOLD_S
    for _ in range(6):
        assert judge.judge("", FAILURES, now) == FULL
        assert judge.judge("", NO_CALLS, now + expected_s - 0.1) == FULL
        now += expected_s
        assert judge.judge("", NO_CALLS, now) == ""
        now += 1.0
        expected_s = min(expected_s * 2, MAX_HOLD_S)
    assert expected_s == MAX_HOLD_S
    now += 2 * MAX_HOLD_S
    assert judge.judge("", FAILURES, now) == FULL
    assert judge.judge("", NO_CALLS, now + FIRST_HOLD_S) == "", "a fault much later is a new one"


def test_success_of_most_calls_ends_the_hold(judge: Judge) -> None:
    assert judge.judge("", FAILURES, 1.0) == FULL
    assert judge.judge("", tally(successes=2, failures=1), 2.0) == ""
    assert judge.judge("", NO_CALLS, 3.0) == ""


# --- Locks.


def test_calls_that_wait_for_rows_are_no_outage(judge: Judge) -> None:
    for second in range(1, 5):
        assert judge.judge("", tally(lock_failures=10), second) == ""


def test_locked_table_is_an_outage_while_calls_fail_and_until_it_is_released(judge: Judge) -> None:
    assert judge.judge("", tally(lock_failures=2), 1.0, table_lock=LOCK) == ""
    assert judge.judge("", tally(lock_failures=1), 2.0, table_lock=LOCK) == LOCK
    assert judge.judge("", NO_CALLS, 20.0, table_lock=LOCK) == LOCK, "without calls it stays so"
    assert judge.judge("", NO_CALLS, 21.0) == ""


def test_locked_table_is_no_outage_while_most_calls_need_another_one(judge: Judge) -> None:
    outcomes = tally(successes=5, lock_failures=4)
    assert judge.judge("", outcomes, 1.0, table_lock=LOCK) == ""
    assert judge.judge("", NO_CALLS, 2.0, table_lock=LOCK) == ""


# --- Reports.


async def test_full_disk_counts_at_each_attempt_and_other_errors_when_a_call_fails() -> None:
    outcomes = Outcomes()
    assert outcomes.report(error_of("53100"), is_write=True, failed_calls=0)
    assert outcomes.report(error_of("25006"), is_write=True, failed_calls=0)
    assert outcomes.report(error_of("53300", "FATAL"), is_write=True, failed_calls=0)
    assert (outcomes.writes.failures, outcomes.reads.failures) == (1, 0)
    assert outcomes.suspects == {"53100", "25006", "53300"}
    assert outcomes.report(error_of("53300", "FATAL"), is_write=False, failed_calls=4)
    assert (outcomes.writes.failures, outcomes.reads.failures) == (1, 4)
    assert "53300" in outcomes.reads.cause
    assert "full" in outcomes.writes.cause


async def test_errors_of_requests_are_no_evidence_against_the_database() -> None:
    outcomes = Outcomes()
    for code in ("23505", "40P01", "22003", "42601"):
        assert not outcomes.report(error_of(code), is_write=True, failed_calls=1)
    assert (outcomes.writes.failures, outcomes.suspects) == (0, set())


async def test_lock_timeouts_cause_a_probe_once_in_some_seconds() -> None:
    outcomes = Outcomes()
    error = error_of("55P03")
    assert outcomes.report(error, is_write=True, failed_calls=0)
    assert outcomes.suspects == {"55P03"}
    assert not any(outcomes.report(error, is_write=True, failed_calls=1) for _ in range(100))
    assert (outcomes.writes.failures, outcomes.writes.lock_failures) == (0, 100)
    outcomes._locks_reported_at -= LOCK_CHECK_INTERVAL_S
    assert outcomes.report(error, is_write=True, failed_calls=0)


async def test_old_successes_say_nothing_about_an_outage() -> None:
    outcomes = Outcomes()
    outcomes.take()
    outcomes.reads.successes = 5
    outcomes.discard_old()
    assert outcomes.reads.successes == 5
    outcomes._since -= WINDOW_S + 1
    outcomes.report(error_of("53300", "FATAL"), is_write=False, failed_calls=1)
    assert (outcomes.reads.successes, outcomes.reads.failures) == (0, 1)
    reads, writes = outcomes.take()
    assert (reads.failures, writes.failures, outcomes.reads.failures) == (1, 0, 0)
