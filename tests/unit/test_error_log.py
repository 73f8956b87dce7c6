"""The log of database errors: one line a minute for each cause that an operator can correct."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from service.store.db import error_log
from service.store.db.error_log import LOG_INTERVAL_S, ErrorLog
from tests.support.sqlstates import error_of


class Clock:
    """The clock of the module, which the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(error_log, "time", clock)
    return clock


def test_each_cause_is_logged_once_a_minute(clock: Clock) -> None:
    log = ErrorLog()
    with capture_logs() as events:
        for _ in range(100):
            log.add(error_of("53100"))
            log.add(error_of("25006"))
        clock.now = LOG_INTERVAL_S - 0.1
        log.add(error_of("53100"))
        assert [event["sqlstate"] for event in events] == ["53100", "25006"]
        clock.now = LOG_INTERVAL_S
        log.add(error_of("53100"))
    assert [event["sqlstate"] for event in events] == ["53100", "25006", "53100"]
    assert {event["event"] for event in events} == {"database error"}
    assert events[0]["cause"] == "the database's disk is full: free or add space"


@pytest.mark.parametrize("code", ["40001", "55P03", "57P01", "57P03", "23505", "22P02", "XX000"])
def test_error_without_a_cause_to_correct_is_not_logged(clock: Clock, code: str) -> None:
    with capture_logs() as events:
        ErrorLog().add(error_of(code))
        ErrorLog().add(ConnectionRefusedError())
    assert not events


def test_log_holds_no_words_of_the_server(clock: Clock) -> None:
    with capture_logs() as events:
        ErrorLog().add(error_of("42P01"))
    assert events
    assert "words of the server" not in str(events)
