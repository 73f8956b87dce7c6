"""What goes wrong in production: each case has a test that shows what must happen, marked `@pytest.mark.case(n=...)`.

`pytest -m 'case(n=9)'` runs the tests of one case.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]

CASES = {
    1: "malformed bytes, invalid UTF-8: INVALID_ARGUMENT (UNAUTHENTICATED without a valid token), the server lives",
    2: "NUL in content, title, metadata: INVALID_ARGUMENT that names the field",
    3: "a request over 4 MiB, a gzip bomb, 20 KB of metadata: RESOURCE_EXHAUSTED, memory bounded, other calls fine",
    4: "an exception whose text holds a DSN: INTERNAL, no secret in status or logs",
    5: "the client cancels in mid-query, 500 times: the pool is as before, no warning from the garbage collector",
    6: "a backend is killed before COMMIT: one row, the client sees OK",
    7: "the connection is cut after COMMIT was sent: exactly one row, and the retry gives the same seq",
    8: "the same message id with another content: ALREADY_EXISTS",
    9: "50 identical requests at once: one row, 50 equal answers",
    10: "all idle backends are killed (suspend): the next call is OK",
    11: "the database refuses for 5 s: OK within the deadline, else UNAVAILABLE",
    12: "the database is black-holed under traffic: calls end on time, liveness stays, not ready within 5 s, recovers by itself",
    13: "a deadlock or 40001: retried, and when exhausted ABORTED",
    14: "100 writers of one session: seq 1 to N, no gap, no tie",
    15: "the service is killed (-9) under load, again and again: every acknowledged message is there once, no gap",
    16: "PostgreSQL is killed (-9) under load: the same, and the service recovers without a restart",
    17: "SIGTERM under load with a watch open: no acknowledged write is lost, exit within the grace",
    18: "four times the load it can carry: RESOURCE_EXHAUSTED and RetryInfo for the excess, goodput holds, health answers",
    19: "user B reads, writes, lists, watches, searches, replays tokens of A: the same answer as for a missing thing",
    20: "tampered page token, page_size -1, injection in every text field: INVALID_ARGUMENT, or stored verbatim",
    21: "a token with alg none, wrong audience, expired, a flood of unknown keys: UNAUTHENTICATED, one key fetch a cool-down",
    22: "ALTER TABLE (a migration) under load, through a transaction pooler: no error that a client sees",
    23: "the pooler is restarted under load: the same as 16",
    24: "Qdrant is down: chat unaffected, search UNAVAILABLE, the index catches up afterwards, deletes too",
    25: "mixed load with cancels: memory stays flat",
}

MISSING: set[int] = set()
"""Those that have no test yet."""


def marks() -> Iterator[tuple[int, str]]:
    """Find each mark in the tests' source, as what is collected depends on what was asked for."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                where = f"{path.relative_to(TESTS)}:{node.lineno}"
                assert [each.arg for each in node.keywords] == ["n"], f"{where}: write case(n=...)"
                yield ast.literal_eval(node.keywords[0].value), where


def test_every_case_has_a_test() -> None:
    shown = defaultdict(list)
    for number, where in marks():
        shown[number].append(where)
    assert not shown.keys() - CASES.keys(), shown
    assert CASES.keys() - shown.keys() == MISSING
