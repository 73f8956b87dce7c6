"""The failures that occur in production, and the check that each of them has a test.

The tests of a case are marked `@pytest.mark.case(n=...)`; `pytest -m 'case(n=9)'` runs those of
case 9.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import SUITES

TESTS = Path(__file__).parents[1]
FAULTS, QUICK = "pytest.mark.faults", "pytest.mark.quick"

CASES = {
    1: "Malformed bytes or invalid UTF-8: INVALID_ARGUMENT (UNAUTHENTICATED without a valid "
    "token), and the server keeps running.",
    2: "NUL in content, title or metadata: INVALID_ARGUMENT that names the field.",
    3: "A request over 4 MiB, a gzip bomb or 20 KB of metadata: RESOURCE_EXHAUSTED, bounded "
    "memory, and other calls are not affected.",
    4: "An exception whose text contains a DSN: INTERNAL, and no secret in the status or the logs.",
    5: "The client cancels during a query, 500 times: the pool is as before, and the garbage "
    "collector reports nothing.",
    6: "A backend is killed before COMMIT: one row, and the client receives OK.",
    7: "The connection breaks after COMMIT was sent: exactly one row, and a retry returns the same "
    "seq.",
    8: "The same message id with other content: ALREADY_EXISTS.",
    9: "50 identical concurrent requests: one row and 50 equal replies.",
    10: "All idle backends are killed, as when Neon suspends: the next call succeeds.",
    11: "The database refuses connections for 5 s: OK within the deadline, otherwise UNAVAILABLE.",
    12: "The database is black-holed under traffic: calls end on time, liveness holds, readiness "
    "is lost within 5 s, and the service recovers automatically.",
    13: "A deadlock or SQLSTATE 40001: retried, and ABORTED once the attempts are exhausted.",
    14: "100 writers of one session: seq 1 to N without gaps or duplicates.",
    15: "The service is killed (-9) under load repeatedly: every acknowledged message is stored "
    "once, without gaps.",
    16: "PostgreSQL is killed (-9) under load: as in case 15, and the service recovers without a "
    "restart.",
    17: "SIGTERM under load with an open watch: no acknowledged write is lost, and the process "
    "exits within the grace period.",
    18: "Four times the admitted load: RESOURCE_EXHAUSTED with RetryInfo for the excess, while "
    "goodput holds and health checks are answered.",
    19: "User B reads, writes, lists, watches, searches or replays the tokens of user A: the same "
    "reply as for a resource that does not exist.",
    20: "A tampered page token, page_size -1 or an injection in any text field: INVALID_ARGUMENT, "
    "or the text is stored verbatim.",
    21: "A token with alg none, a wrong audience or an expiry in the past, or a flood of unknown "
    "keys: UNAUTHENTICATED, and one fetch of the keys per cool-down.",
    22: "ALTER TABLE (a migration) under load, also through a transaction pooler: clients see no "
    "errors.",
    23: "The pooler is restarted under load: as in case 16.",
    24: "Qdrant is down: chat is not affected, search is UNAVAILABLE, and the index catches up "
    "afterwards, also on deletions.",
    25: "A mixed load with cancellations: memory stays flat.",
    501: "The database is read-only for some time: writes are UNAVAILABLE, reads go on, and both "
    "recover without a restart. So they do when the primary becomes a standby.",
    502: "Several servers, named in any of libpq's forms, with a failover, planned or not: no "
    "restart, and nothing acknowledged is lost with synchronous replication.",
    503: "The server is a standby: NOT_SERVING with the reason, and migrate refuses it.",
    504: "A commit is stored on the primary only, as its wait for a standby was cut: it is not "
    "acknowledged before the standby has it.",
    505: "The disk is full: UNAVAILABLE with RetryInfo and NOT_SERVING for writes; the embedded "
    "PostgreSQL and the log say so in one line, and search backs off.",
    506: "The server rejects the role, its password or the database: UNAVAILABLE with the cause. A "
    "password or certificate that is changed in its file is used without a restart.",
    507: "A timeout of the server or the role ends statements: UNAVAILABLE, and the setting is "
    "named in the log and by check.",
    508: "Settings of the server or the role are weaker than promised: appends raise "
    "synchronous_commit, and check and the log at the start name each setting.",
    509: "Tables are locked: a status of our own before the deadline, and the holder is named.",
    510: "PostgreSQL's clock is set back: waiting changes are indexed, reindex ends, and no age is "
    "negative.",
    511: "HOME belongs to another user: the service reads no file in it, and connects.",
    512: "A URL with search_path, direct or through a pooler: it names the schema of the tables. "
    "An option that cannot be honoured is an error.",
    513: "A database with an application's tables users and alembic_version: migrate leaves them "
    "alone, and refuses a schema in which they are in the way.",
    514: "A pooler whose name and port do not show it: found by its behaviour, with its pool mode, "
    "unless a setting says what it is.",
    515: "A database in SQL_ASCII or LATIN1: refused at start and by migrate, with the command "
    "that creates one in UTF8.",
    516: "A database with the locale C: lexical search ignores the case of letters in all scripts.",
    517: "The database goes back in time, by a restore or by a failover that loses commits: open "
    "watches and those after a lost seq end in OUT_OF_RANGE with HISTORY_RESTORED, and the search "
    "index is rebuilt. A failover that loses nothing changes nothing.",
    518: "The schema stops fitting below a running service: NOT_SERVING until it fits again.",
    519: "The service is killed (-9) twelve times during its first start: the next start recovers.",
    520: "PostgreSQL rejects further connections while those of the pool serve: ready.",
    521: "Files of the embedded database are lost or damaged: one line that names the file and "
    "what to do.",
    522: "An address of the service is in use: the message names its setting.",
    523: "The search process stops or has no memory: health reports it, the process is replaced, "
    "and its memory is bounded.",
    524: "A statement fails for good: every waiting call is answered with its error, and nothing "
    "is repeated without a pause.",
}

FIRST_FAULT_OF_THE_DATABASE = 501
"""This case and the later ones must be covered by `make test-faults`."""
MISSING: set[int] = set()
"""The cases that have no test yet."""


class CaseMark(NamedTuple):
    """A `case` mark in the source of the tests."""

    number: int
    location: str
    is_fault: bool
    """Whether `make test-faults` runs the test."""


def marks() -> Iterator[CaseMark]:
    """Yield every `case` mark.

    The source is read, because a run may collect only some of the tests.
    """
    for path in TESTS.rglob("test_*.py"):
        module = ast.parse(path.read_text())
        of_module = " ".join(
            ast.unparse(node) for node in module.body if ast.unparse(node).startswith("pytestmark")
        )
        suite = SUITES.get(path.parent.name)
        has_faults = FAULTS in of_module or (suite is not None and suite.name == "faults")
        for node in module.body:
            of_test = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
            is_fault = (has_faults or FAULTS in of_test) and QUICK not in of_test
            for number, line in numbers(node):
                yield CaseMark(number, f"{path.relative_to(TESTS)}:{line}", is_fault)


def numbers(node: ast.AST) -> Iterator[tuple[int, int]]:
    """Yield the numbers of the `case` marks in a part of the source, with their lines."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "pytest.mark.case":
            [keyword] = inner.keywords
            assert keyword.arg == "n", "write case(n=...)"
            yield ast.literal_eval(keyword.value), inner.lineno


def test_every_case_has_a_test() -> None:
    locations = defaultdict(list)
    for mark in marks():
        locations[mark.number].append(mark.location)
    assert not locations.keys() - CASES.keys(), locations
    assert CASES.keys() - locations.keys() == MISSING


def test_every_fault_of_the_database_has_a_test_in_test_faults() -> None:
    faults = {number for number in CASES if number >= FIRST_FAULT_OF_THE_DATABASE}
    assert faults - {mark.number for mark in marks() if mark.is_fault} == MISSING & faults
