"""The rules for SQLSTATEs: every code that PostgreSQL 15 to 18 defines has its policy and status.

The lists come from PostgreSQL itself: `errcodes.txt` is installed with every server (versions 16
and 18 with the embedded one, 15 with Debian's), and asyncpg has a class for each code. Together
they contain the codes of version 17: those that it added to 16 are in 18's list, too.
"""

from __future__ import annotations

import asyncpg
import pytest
from grpc import StatusCode
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.rpc.status import CODES
from service.store.db.db_errors import (
    NoServer,
    WrongRole,
    classify,
    describe,
    driver_error,
    may_have_committed,
    rule,
    sqlstate,
    to_service_error,
)
from service.store.db.sqlstates import BY_CLASS, BY_CODE, Failure, Policy, Scope, rule_of
from tests.support.sqlstates import all_codes, error_of, lists

STATUS_BY_FAILURE = {
    Failure.CONTENTION: (StatusCode.ABORTED, "CONTENTION"),
    Failure.LOCKED: (StatusCode.ABORTED, "CONTENTION"),
    Failure.LOST: (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
    Failure.OUTAGE: (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
    Failure.CANCELLED: (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
    Failure.DENIED: (StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"),
    Failure.BAD_DATA: (StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST"),
    Failure.DEFECT: (StatusCode.INTERNAL, "INTERNAL"),
}

# The codes that may end in INTERNAL: statements that the service never sends, and violations that
# its code prevents or handles. A code that is added here needs a reason.
_DEFECTS = """
03000 09000 0A000 0B000 0F000 0F001 0L000 0LP01 0Z000 0Z002 10608 20000 21000
23000 23001 23502 23503 23505 23514 23P01 24000
25000 25001 25002 25003 25004 25005 25007 25008 25P01 25P02 27000 2B000 2BP01 2D000
2F000 2F002 2F003 2F004 2F005 34000 38000 38001 38002 38003 38004
39000 39001 39004 39P01 39P02 39P03 3B000 3B001
42000 42601 42602 42611 42622 42701 42702 42710 42712 42723 42725 42803 42830 42846 42939
42P02 42P03 42P04 42P06 42P07 42P08 42P09 42P11 42P12 42P13 42P14 42P15 42P16 42P17 42P18 42P19
42P20 42P21 42P22 44000 54011 54023 55P04
HV000 HV001 HV002 HV004 HV005 HV006 HV007 HV008 HV009 HV00A HV00B HV00C HV00D HV00J HV00K HV00L
HV00M HV00N HV00P HV00Q HV00R HV010 HV014 HV021 HV024 HV090 HV091 XX000
"""
DEFECTS = _DEFECTS.split()

# One or two codes of each rule, with the failure that production trials have shown to be right.
EXAMPLES = {
    "08006": Failure.LOST,
    "25006": Failure.OUTAGE,
    "25P03": Failure.LOST,
    "25P04": Failure.LOST,
    "26000": Failure.OUTAGE,
    "28000": Failure.OUTAGE,
    "28P01": Failure.OUTAGE,
    "3D000": Failure.OUTAGE,
    "40001": Failure.CONTENTION,
    "40P01": Failure.CONTENTION,
    "42501": Failure.DENIED,
    "42P01": Failure.DENIED,
    "42703": Failure.DENIED,
    "53100": Failure.OUTAGE,
    "53300": Failure.OUTAGE,
    "55000": Failure.OUTAGE,
    "55P03": Failure.LOCKED,
    "57014": Failure.CANCELLED,
    "57P01": Failure.LOST,
    "57P03": Failure.OUTAGE,
    "58030": Failure.DENIED,
    "P0001": Failure.DENIED,
    "22P02": Failure.BAD_DATA,
    "XX000": Failure.DEFECT,
    "XX001": Failure.DENIED,
}

_OPERATOR_MUST_ACT = """
25006 25P03 25P04 26000 28000 28P01 3D000 42P05 53100 53200 53300 53400 55000 57014 57P04
"""
OPERATOR_MUST_ACT = _OPERATOR_MUST_ACT.split()


def status_of(error: BaseException) -> tuple[StatusCode, str]:
    answer = to_service_error(error)
    return (CODES[type(answer)], answer.reason) if answer else (StatusCode.INTERNAL, "INTERNAL")


def broken_by(code: str) -> asyncpg.PostgresError:
    """Return the driver's error for a connection that the server closes with these last words."""
    error = asyncpg.ConnectionDoesNotExistError("connection was closed")
    error.__cause__ = error_of(code, "FATAL")
    return error


def wrapped(error: BaseException) -> DBAPIError:
    """Return an error as SQLAlchemy raises it: its dialect's own error is in between."""
    translated = Exception("translated")
    translated.__cause__ = error
    return DBAPIError("SELECT 1", {}, translated)


def test_lists_of_codes_are_installed() -> None:
    """Without them the tests below would pass for lack of codes."""
    assert len(list(lists())) >= 2
    assert {"25006", "25P04", "58P03", "72000"} < all_codes()
    assert len(all_codes()) > 240


def test_every_code_has_a_rule_and_the_status_of_its_failure() -> None:
    for code in sorted(all_codes()):
        assert code[:2] in BY_CLASS, f"{code}: PostgreSQL has a new class: give it a rule"
        error = error_of(code)
        assert rule(error) == rule_of(code), code
        assert status_of(error) == STATUS_BY_FAILURE[classify(error)], code


def test_only_the_listed_codes_end_in_internal() -> None:
    internal = {code for code in all_codes() if status_of(error_of(code))[1] == "INTERNAL"}
    assert internal == set(DEFECTS)
    assert {code for code in all_codes() if rule_of(code).policy is Policy.DEFECT} == internal


@pytest.mark.parametrize("code", EXAMPLES)
def test_code_means_what_production_has_shown(code: str) -> None:
    assert classify(error_of(code)) is EXAMPLES[code]
    assert classify(wrapped(error_of(code))) is EXAMPLES[code]


def test_rules_for_single_codes_name_existing_codes() -> None:
    assert set(BY_CODE) <= all_codes()


def test_error_that_an_operator_must_act_on_names_the_cause() -> None:
    """Without it, the log and `check` would have nothing to say."""
    denied = {code for code in all_codes() if rule_of(code).failure is Failure.DENIED}
    for code in (*denied, *OPERATOR_MUST_ACT):
        assert rule_of(code).cause, code
    assert all(rule_of(code).scope is Scope.ALL for code in denied)


def test_only_writes_are_impossible_on_a_read_only_server_and_on_a_full_disk() -> None:
    assert {code for code in all_codes() if rule_of(code).scope is Scope.WRITES} == {
        "25006",
        "53100",
    }


def test_fatal_error_is_never_internal() -> None:
    """A session that the server rejects at its start, or ends, is an outage, whatever the code."""
    for code in sorted(all_codes()):
        assert classify(error_of(code, "FATAL")) in (Failure.OUTAGE, Failure.LOST), code


def test_unknown_class_is_a_defect() -> None:
    assert status_of(error_of("Z1234"))[0] is StatusCode.INTERNAL
    assert classify(error_of("Z1234", "FATAL")) is Failure.OUTAGE


@pytest.mark.parametrize("code", ["53200", "58030", "25P03", "25P04", "57P01", "XX000"])
def test_connection_that_breaks_in_a_statement_leaves_the_outcome_unknown(code: str) -> None:
    """The server's last words are the cause of the driver's error."""
    for error in (broken_by(code), wrapped(broken_by(code))):
        assert classify(error) is Failure.LOST
        assert sqlstate(error) == code
        assert rule(error).cause == rule_of(code).cause
        assert may_have_committed(error)


@pytest.mark.parametrize("name", ["transaction_timeout", "idle_in_transaction_session_timeout"])
def test_timeout_of_the_server_that_ends_a_connection_is_named(name: str) -> None:
    code = {"transaction_timeout": "25P04", "idle_in_transaction_session_timeout": "25P03"}[name]
    assert rule(broken_by(code)).cause.startswith(f"{name} ended a transaction")


def test_timeout_of_the_driver_leaves_the_outcome_unknown() -> None:
    assert classify(TimeoutError()) is Failure.OUTAGE
    assert may_have_committed(TimeoutError())
    assert not may_have_committed(ConnectionRefusedError())
    assert not may_have_committed(PoolTimeoutError("no connection is free"))
    assert not may_have_committed(error_of("40001"))


def pooler_error(message: str, detail: str = "") -> asyncpg.PostgresError:
    fields = {"S": "FATAL", "V": "FATAL", "C": "08P01", "M": message, "D": detail}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    return error


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        ("server login has been failing, try again later (server_login_retry)", Failure.OUTAGE),
        ("pgbouncer cannot connect to server", Failure.OUTAGE),
        ("server conn crashed?", Failure.LOST),
        ("server closed the connection unexpectedly", Failure.LOST),
    ],
)
def test_pooler_that_reached_no_server_differs_from_one_whose_server_broke(
    message: str, failure: Failure
) -> None:
    error = pooler_error(message)
    assert classify(error) is failure
    broken = asyncpg.ConnectionDoesNotExistError("connection was closed")
    broken.__cause__ = error
    assert classify(broken) is failure
    assert may_have_committed(broken) == (failure is Failure.LOST)


def test_data_that_an_error_quotes_does_not_change_its_meaning() -> None:
    """A user may write the words of a pooler into a message."""
    words = "pgbouncer cannot connect"
    quoted = asyncpg.UniqueViolationError("duplicate key value")
    quoted.detail = f"Key (email)=({words}) already exists."
    assert words in str(quoted)
    assert classify(quoted) is Failure.DEFECT
    assert classify(asyncpg.InvalidTextRepresentationError(words)) is Failure.BAD_DATA


def test_missing_primary_says_more_than_a_server_that_is_down() -> None:
    error = NoServer(
        [
            ("h1:5432", ConnectionRefusedError()),
            ("h2:5432", TimeoutError()),
            ("h3:5432", error_of("28P01", "FATAL")),
            ("h4:5432", WrongRole("a standby")),
        ]
    )
    assert sqlstate(error) == "25006"
    assert rule(error) == rule_of("25006")
    assert driver_error(error) is error
    assert describe(error) == (
        "no server can be used: h1:5432: ConnectionRefusedError; h2:5432: no answer in time; "
        "h3:5432: SQLSTATE 28P01; h4:5432: a standby"
    )
    assert classify(NoServer([("h1:5432", ConnectionRefusedError())])) is Failure.OUTAGE


def test_description_is_in_words_of_our_own() -> None:
    assert describe(error_of("53100")) == (
        "the database's disk is full: free or add space (SQLSTATE 53100)"
    )
    assert describe(error_of("57P03", "FATAL")) == "the database does not answer (57P03)"
    assert describe(ConnectionRefusedError("secret")) == (
        "the database does not answer (ConnectionRefusedError)"
    )
    for code in all_codes():
        assert "words of the server" not in describe(error_of(code))
