"""Search of messages by words: a scan of the user's own messages, which costs the append path nothing (docs/explanation/search-quality.md has figures).

Words are compared as they are written, in any case and in any language (PostgreSQL's `simple` configuration): users write several
languages, often in one session, and a stemmer of the wrong one finds less than none. Search by meaning finds other forms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select

from service.store.db.database import Database
from service.store.db.hot_pool import Record, Statement
from service.store.rows import MessageRow, message_columns
from service.store.tables import chat_messages

START, END = "\ue000", "\ue001"
"""What marks a match in a snippet: characters of the private use area, which text does not hold."""

MAX_CANDIDATES = 2000
"""Messages, the newest first, that are ranked of those that hold the words."""
MAX_TEXT_CHARS = 32_768
"""Characters of a message that are ranked, and of which a snippet is made."""
MAX_REPLY_BYTES = 3 * 1024 * 1024
"""Where a reply stops."""
_SNIPPET = f'MaxFragments=2, MaxWords=30, MinWords=12, FragmentDelimiter=" … ", StartSel={START}, StopSel={END}'
_NOT = re.compile(r"(?<!\S)-(\"[^\"]*\"?|\S+)")
_QUOTED = re.compile(r'"[^"]*"?')
_OR = re.compile(r"(?<!\S)or(?!\S)", re.IGNORECASE)


class Match(NamedTuple):
    """A message that was found by words."""

    session_id: str
    message_id: str
    rank: float


class MatchedMessage(NamedTuple):
    """A message that was found, with the part that fits."""

    session_id: str
    message: MessageRow
    snippet: str


def _search(*, one_session: bool) -> Statement:
    # What holds the words as they are, anywhere, is found by comparing text alone; the few that do are taken apart.
    match = "AND m.session_id = $6" if one_session else ""
    return Statement.from_text(f"""
WITH wanted AS (
    SELECT websearch_to_tsquery('simple', $2) AS query,
           ARRAY(SELECT '%' || regexp_replace(word, '([\\\\%_])', '\\\\\\1', 'g') || '%'
                 FROM unnest(tsvector_to_array(to_tsvector('simple', $3))) AS word) AS words
), candidates AS (
    SELECT m.session_id, m.seq
    FROM chat_messages AS m
    WHERE m.user_id = $1 {match} AND m.deleted_at IS NULL AND m.content <> ''
      AND CASE WHEN $4 THEN lower(m.content) LIKE ANY ((SELECT words FROM wanted)::text[])
               ELSE lower(m.content) LIKE ALL ((SELECT words FROM wanted)::text[]) END
    ORDER BY m.created_at DESC, m.session_id, m.seq DESC
    LIMIT {MAX_CANDIDATES}
)
SELECT c.session_id::text, m.id::text, ts_rank_cd(v.lexemes, w.query)::float8 AS rank
FROM candidates AS c
JOIN chat_messages AS m ON m.user_id = $1 AND m.session_id = c.session_id AND m.seq = c.seq
CROSS JOIN wanted AS w
CROSS JOIN LATERAL (SELECT to_tsvector('simple', left(m.content, {MAX_TEXT_CHARS})) AS lexemes OFFSET 0) AS v
WHERE v.lexemes @@ w.query
ORDER BY rank DESC, m.created_at DESC, m.session_id, m.seq DESC
LIMIT $5
""")  # noqa: S608 - nothing but text of ours goes in


_EVERYWHERE, _IN_SESSION = _search(one_session=False), _search(one_session=True)

_columns = (
    Statement(select(*message_columns(chat_messages.alias("m"))))
    .text.partition("FROM")[0]
    .removeprefix("SELECT ")
)
_READ = Statement.from_text(f"""
WITH found AS (
    SELECT w.n, m.session_id, m.seq, m.size, sum(m.size) OVER (ORDER BY w.n) AS running
    FROM unnest($2::uuid[], $3::uuid[]) WITH ORDINALITY AS w (session_id, id, n)
    JOIN chat_messages AS m ON m.user_id = $1 AND m.session_id = w.session_id AND m.id = w.id
    WHERE m.deleted_at IS NULL
)
SELECT f.session_id::text, ts_headline(
           'simple', left(m.content, {MAX_TEXT_CHARS}), replace(plainto_tsquery('simple', $4)::text, '&', '|')::tsquery, '{_SNIPPET}'),
       {_columns}
FROM found AS f
JOIN chat_messages AS m ON m.user_id = $1 AND m.session_id = f.session_id AND m.seq = f.seq
WHERE f.running - f.size < {MAX_REPLY_BYTES}
ORDER BY f.n
""")  # noqa: S608


def wanted(query: str) -> tuple[str, bool]:
    """Return what a query asks for, without what it excludes, and whether any of it is enough (`or`)."""
    positive = _NOT.sub(" ", query)
    if "or" not in _QUOTED.sub(" ", positive).lower().split():
        return positive, False
    return _OR.sub(" ", positive), True


async def search(
    database: Database,
    user_id: str,
    query: str,
    session_id: str | None,
    limit: int,
    deadline: float,
) -> list[Match]:
    """Find a user's messages by words, best first; of equal ones the newest first."""
    positive, any_ = wanted(query)
    statement, more = (_IN_SESSION, (session_id,)) if session_id else (_EVERYWHERE, ())
    rows = await database.fetch(
        statement, user_id, query, positive, any_, limit, *more, deadline=deadline
    )
    return [Match(*row) for row in rows]


async def read_matches(
    database: Database, user_id: str, keys: Sequence[tuple[str, str]], query: str, deadline: float
) -> list[MatchedMessage]:
    """Read messages by (session id, id) in this order, each with the part that fits; those that are gone are left out."""
    sessions, ids = [session for session, _ in keys], [id_ for _, id_ in keys]
    rows: list[Record] = await database.fetch(
        _READ, user_id, sessions, ids, wanted(query)[0], deadline=deadline
    )
    return [MatchedMessage(row[0], MessageRow._make(row[2:]), row[1]) for row in rows]
