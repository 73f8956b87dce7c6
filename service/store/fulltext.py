"""Lexical search of messages: a scan of the user's own messages.

It needs no index, and so costs the append path nothing; docs/explanation/search-quality.md has
measurements.

Words are compared as written, ignoring case, in any language (PostgreSQL's `simple` configuration).
Users write several languages, often in one session, and the stemmer of a wrong language finds fewer
matches than no stemmer. Semantic search finds other forms of a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from service.store.db.hot_pool import Record, Statement
from service.store.db.read_batching import ReadBatcher
from service.store.rows import MAX_PAGE_BYTES, MessageRow, message_columns
from service.store.tables import chat_messages

MATCH_START, MATCH_END = "\ue000", "\ue001"
"""Marks of a match in a snippet: private use characters, which text rarely contains.

Known defect: they are not removed from the text, so the snippet of a message that contains them has
unbalanced marks.
"""

MAX_CANDIDATES = 2000
"""Messages that contain the words and are ranked, at most: the newest ones."""
MAX_TEXT_CHARS = 32_768
"""Characters of a message, from its beginning, that are ranked and that snippets are taken from."""
_SNIPPET_OPTIONS = (
    'MaxFragments=2, MaxWords=30, MinWords=12, FragmentDelimiter=" … ", '
    f"StartSel={MATCH_START}, StopSel={MATCH_END}"
)
_EXCLUDED_TERM = re.compile(r"(?<!\S)-(\"[^\"]*\"?|\S+)")
_PHRASE = re.compile(r'"[^"]*"?')
_OR = re.compile(r"(?<!\S)or(?!\S)", re.IGNORECASE)


class Match(NamedTuple):
    """A message that matches a query."""

    session_id: str
    message_id: str
    rank: float


class MatchedMessage(NamedTuple):
    """A message with the part of it that matches, in which matches are marked."""

    session_id: str
    message: MessageRow
    snippet: str


def _search_statement(*, in_session: bool) -> Statement:
    # Comparing text is cheap and finds all messages with the words; only those are then parsed.
    match = "AND m.session_id = $6" if in_session else ""
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
CROSS JOIN LATERAL (
    SELECT to_tsvector('simple', left(m.content, {MAX_TEXT_CHARS})) AS lexemes OFFSET 0
) AS v
WHERE v.lexemes @@ w.query
ORDER BY rank DESC, m.created_at DESC, m.session_id, m.seq DESC
LIMIT $5
""")  # noqa: S608 - only constants of this module are inserted


_SEARCH_USER = _search_statement(in_session=False)
_SEARCH_SESSION = _search_statement(in_session=True)

_message_columns = (
    Statement(sa.select(*message_columns(chat_messages.alias("m"))))
    .text.partition("FROM")[0]
    .removeprefix("SELECT ")
)
_READ_MATCHES = Statement.from_text(f"""
WITH matches AS (
    SELECT w.n, m.session_id, m.seq, m.size, sum(m.size) OVER (ORDER BY w.n) AS running_bytes
    FROM unnest($2::uuid[], $3::uuid[]) WITH ORDINALITY AS w (session_id, id, n)
    JOIN chat_messages AS m ON m.user_id = $1 AND m.session_id = w.session_id AND m.id = w.id
    WHERE m.deleted_at IS NULL
)
SELECT f.session_id::text,
       ts_headline(
           'simple', left(m.content, {MAX_TEXT_CHARS}),
           replace(plainto_tsquery('simple', $4)::text, '&', '|')::tsquery, '{_SNIPPET_OPTIONS}'
       ),
       {_message_columns}
FROM matches AS f
JOIN chat_messages AS m ON m.user_id = $1 AND m.session_id = f.session_id AND m.seq = f.seq
WHERE f.running_bytes - f.size < {MAX_PAGE_BYTES}
ORDER BY f.n
""")  # noqa: S608 - only constants of this module are inserted


def wanted_words(query: str) -> tuple[str, bool]:
    """Return a query without its excluded terms, and whether any one of the others is enough.

    The latter is true if the query contains the word `or`.
    """
    positive = _EXCLUDED_TERM.sub(" ", query)
    if "or" not in _PHRASE.sub(" ", positive).lower().split():
        return positive, False
    return _OR.sub(" ", positive), True


async def search(
    reads: ReadBatcher,
    user_id: str,
    query: str,
    session_id: str | None,
    limit: int,
    deadline: float,
) -> list[Match]:
    """Find up to `limit` of a user's messages by words, best first, newer first at equal rank."""
    words, is_any_enough = wanted_words(query)
    arguments = (user_id, query, words, is_any_enough, limit)
    if session_id is None:
        records = await reads.database.fetch(_SEARCH_USER, *arguments, deadline=deadline)
    else:
        records = await reads.database.fetch(
            _SEARCH_SESSION, *arguments, session_id, deadline=deadline
        )
    return [Match(*record) for record in records]


async def read_matches(
    reads: ReadBatcher, user_id: str, keys: Sequence[tuple[str, str]], query: str, deadline: float
) -> list[MatchedMessage]:
    """Read messages by (session id, message id), in this order, up to MAX_PAGE_BYTES.

    Messages that were deleted are left out.
    """
    session_ids = [session_id for session_id, _ in keys]
    message_ids = [message_id for _, message_id in keys]
    words, _ = wanted_words(query)
    records: list[Record] = await reads.database.fetch(
        _READ_MATCHES, user_id, session_ids, message_ids, words, deadline=deadline
    )
    return [
        MatchedMessage(record[0], MessageRow._make(record[2:]), record[1]) for record in records
    ]
