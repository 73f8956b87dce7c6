"""The sentinel: every statement that a test causes must be constrained to an owner.

`owner_checker.py` explains the rule. A few statements are exempt by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from pglast import parse_sql
from pglast.parser import ParseError

from tests.support.cluster import LoggedStatement
from tests.support.owner_checker import OwnerChecker

_COLUMNS = "SELECT [^;]*"
NAMED = {
    "list users": (
        rf"{_COLUMNS} FROM users WHERE users\.id > \$2::UUID"
        r" ORDER BY users\.id LIMIT \$3::INTEGER\) AS candidates [^;]*"
    ),
    "look a user up by e-mail address": (
        rf"{_COLUMNS} FROM users WHERE lower\(users\.email\) = lower\(\$1::VARCHAR\)"
        r" AND users\.id != \$2::UUID"
    ),
    "look a user up by external id": (
        rf"{_COLUMNS} FROM users WHERE users\.external_id = \$1::VARCHAR AND users\.id != \$2::UUID"
    ),
    "claim rows of the outbox": (
        r"WITH due AS \( SELECT o\.kind, o\.user_id, o\.entity_id FROM search_outbox AS o"
        r" [^;]* FOR UPDATE OF o SKIP LOCKED \) "
        r"UPDATE search_outbox AS o SET lease_id = \$2, [^;]*"
    ),
    "purge a slice of the expired tombstones of sessions": (
        r"DELETE FROM session_tombstones USING \(SELECT [^;]* FROM session_tombstones"
        r" WHERE session_tombstones\.deleted_at < clock_timestamp\(\) - interval '24 hours'"
        r" ORDER BY session_tombstones\.deleted_at LIMIT [^;]* FOR UPDATE SKIP LOCKED\)"
        r" AS expired WHERE [^;]*"
    ),
    "date rows of the outbox again": (
        r"WITH ahead AS \( SELECT o\.kind, o\.user_id, o\.entity_id FROM search_outbox AS o"
        r" [^;]* FOR UPDATE OF o SKIP LOCKED \) "
        r"UPDATE search_outbox AS o SET due_at = [^;]*"
    ),
    "count the rows of the outbox": r"SELECT count\(\*\)[^;]* FROM search_outbox",
    "name one dead letter of the outbox": (
        r"SELECT min\([^;]*\) FROM search_outbox WHERE due_at = 'infinity'"
    ),
    "retry the dead letters of the outbox": (
        r"UPDATE search_outbox SET due_at = now\(\), attempts = 0 WHERE due_at = 'infinity'"
    ),
    "begin a rebuild of the search index": r"UPDATE search_indexes SET building = \$3, [^;]*",
    "read the progress of a rebuild": (
        r"SELECT i\.building, [^;]* FROM search_indexes AS i WHERE i\.alias = \$1"
    ),
    "enqueue a slice of all entities for a rebuild": (
        r"WITH slice AS \( SELECT t\.user_id, t\.id FROM (documents|chat_sessions) AS t [^;]*"
    ),
}
"""The statements that need no owner, as expressions for the whole text with single spaces."""


def complaints(statements: Iterable[LoggedStatement]) -> list[str]:
    """Return the problems of these statements as texts."""
    return [
        f"{problem}\n"
        f"in a statement of {statement.application!r} in {statement.database!r}:\n"
        f"{statement.sql}"
        for statement in dict.fromkeys(statements)
        for problem in problems(statement.sql)
    ]


@functools.cache
def problems(sql: str) -> tuple[str, ...]:
    """Return the ways in which a statement could touch another user's data."""
    flat = " ".join(sql.split()).rstrip("; ")
    if any(re.fullmatch(pattern, flat) for pattern in NAMED.values()):
        return ()
    try:
        statements = parse_sql(sql)
    except ParseError as error:
        return (f"the statement cannot be parsed: {error}",)
    checker = OwnerChecker()
    for statement in statements:
        checker.statement(statement.stmt)
    return tuple(dict.fromkeys(checker.problems))
