"""The failures that occur in production, and the check that each of them has a test.

The tests of a case are marked `@pytest.mark.case(n=...)`; `pytest -m 'case(n=9)'` runs those of
case 9.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]

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
    "recover without a restart.",
    502: "Several servers with a failover, planned or not: no restart, and nothing acknowledged is "
    "lost with synchronous replication.",
    505: "The disk is full: UNAVAILABLE with RetryInfo and NOT_SERVING for writes; the embedded "
    "PostgreSQL and the log say so in one line.",
    506: "The server rejects the role, its password or the database: UNAVAILABLE with the cause. A "
    "password or certificate that is changed in its file is used without a restart.",
    509: "Tables are locked: a status of our own before the deadline, and the holder is named.",
    512: "A URL with search_path, direct or through a pooler: it names the schema of the tables. "
    "An option that cannot be honoured is an error.",
    513: "A database with an application's tables users and alembic_version: migrate leaves them "
    "alone, and refuses a schema in which they are in the way.",
    514: "A pooler whose name and port do not show it: found by its behaviour, with its pool mode, "
    "unless a setting says what it is.",
    515: "A database in SQL_ASCII or LATIN1: refused at start and by migrate, with the command "
    "that creates one in UTF8.",
    518: "The schema stops fitting below a running service: NOT_SERVING until it fits again.",
    517: "The database goes back in time, by a restore or by a failover that loses commits: open "
    "watches and those after a lost seq end in OUT_OF_RANGE with HISTORY_RESTORED, and the search "
    "index is rebuilt. A failover that loses nothing changes nothing.",
    519: "The service is killed (-9) twelve times during its first start: the next start recovers.",
    520: "PostgreSQL rejects further connections while those of the pool serve: ready.",
    521: "Files of the embedded database are lost or damaged: one line that names the file and "
    "what to do.",
}

MISSING: set[int] = set()
"""The cases that have no test yet."""


def marks() -> Iterator[tuple[int, str]]:
    """Yield the number and the location of every `case` mark in the source of the tests.

    The source is read, because a run may collect only some of the tests.
    """
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                location = f"{path.relative_to(TESTS)}:{node.lineno}"
                names = [keyword.arg for keyword in node.keywords]
                assert names == ["n"], f"{location}: write case(n=...)"
                yield ast.literal_eval(node.keywords[0].value), location


def test_every_case_has_a_test() -> None:
    locations = defaultdict(list)
    for number, location in marks():
        locations[number].append(location)
    assert not locations.keys() - CASES.keys(), locations
    assert CASES.keys() - locations.keys() == MISSING
