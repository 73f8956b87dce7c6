"""Lexical search of messages: a scan of the user's own messages.

It needs no index, and so costs the append path nothing; docs/explanation/search-quality.md has
measurements. The cost of a search is limited by the words of its query, by the number and the
size of the messages that are parsed, and by the statement timeout of expensive work.

Words are compared as written, ignoring case, in any language (PostgreSQL's `simple` configuration).
Users write several languages, often in one session, and the stemmer of a wrong language finds fewer
matches than no stemmer. Semantic search finds other forms of a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.errors import InvalidArgument
from service.store import tsquery
from service.store.bounded_reads import Page
from service.store.db.db_errors import sqlstate
from service.store.db.hot_pool import Statement, fetch_on
from service.store.letter_case import find_collation, folded, folds_case, lowered
from service.store.rows import MAX_PAGE_BYTES, MessageRow, message_columns
from service.store.tables import chat_messages

MATCH_START, MATCH_END = "\ue000", "\ue001"
"""Marks of a match in a snippet: private use characters, which are removed from the text itself."""

MAX_TERMS = 64
"""Words of a query, with each part of a hyphenated or otherwise compound word."""
MAX_QUERY_CHARS = 2_048
"""Characters of a query. PostgreSQL needs 0.5 s to parse 8,000 characters such as `a_a_a_`."""
MAX_RANKED_TERMS = 16
"""Words of a query that count for the rank: its first ones. Ranking by more costs seconds."""
MAX_COMPARED_WORDS = 8
"""Words that must occur and are searched for in a text before it is parsed: the longest ones."""
MAX_CANDIDATES = 2000
"""Messages that contain the words and are parsed and ranked, at most: the newest ones."""
MAX_CANDIDATE_BYTES = 4 * 1024 * 1024
"""Bytes of these messages' texts, at most."""
MAX_TEXT_CHARS = 32_768
"""Characters of a message, from its beginning, that are searched and that snippets are from."""
MAX_SNIPPET_CHARS = 1_200
"""Characters of a snippet before it is escaped. A usual one has 400; a long word needs more."""
SNIPPET_LEAD_CHARS = 300
"""Characters of a long snippet before its first match."""
_EXCERPT_CHARS, _EXCERPT_STEP_CHARS = 4_096, 3_840
"""Lengths and distances of the excerpts of a text, of which the best one contains the snippet.

PostgreSQL's search for the best snippet costs 0.2 s for a text of 32,768 characters and 64 words.
"""
_SNIPPET_OPTIONS = (
    'MaxFragments=2, MaxWords=30, MinWords=12, FragmentDelimiter=" … ", '
    f"StartSel={MATCH_START}, StopSel={MATCH_END}"
)
_PARSE = sa.select(
    sa.cast(
        sa.func.websearch_to_tsquery("simple", sa.bindparam("query", type_=sa.Text())), sa.Text
    ),
    folds_case(),
)
_WORD = re.compile(r"\S*\w\S*")
_PARSE_ERRORS = ("XX000", "54000", "54001")
"""PostgreSQL's errors for a query that it cannot parse.

More than 32 operators in a row, such as `-`, are an internal error: "tsquery stack too small".
"""


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


@dataclass(frozen=True, slots=True)
class LexicalQuery:
    """A query as PostgreSQL reads it, with what is derived from it. Queries are in text form."""

    matched: str
    """The query that decides whether a message matches."""
    ranked: str | None
    """The query that ranks a message; None if the query only excludes words."""
    marked: str | list[str]
    """The query whose words are marked in snippets; with a collation, these words."""
    all_patterns: Sequence[str]
    """LIKE patterns that all apply to a text that matches."""
    any_patterns: Sequence[str]
    """LIKE patterns of which one applies to a text that matches, unless there are none."""
    collation: str | None
    """The collation that converts texts to lower case; None if the database does it."""


def check_query(text: str) -> None:
    """Reject a query that is certainly too long, without PostgreSQL.

    Raises:
        InvalidArgument: it has more than MAX_QUERY_CHARS characters or MAX_TERMS words.
    """
    if len(text) > MAX_QUERY_CHARS:
        raise InvalidArgument.field(
            "query",
            f"has {len(text)} characters; lexical search takes at most {MAX_QUERY_CHARS}",
        )
    count = sum(word.lower() != "or" for word in _WORD.findall(text))
    if count > MAX_TERMS:
        raise _too_many_terms_error(count)


def _too_many_terms_error(count: int) -> InvalidArgument:
    return InvalidArgument.field(
        "query",
        f"has {count} words, counting each part of a compound word; lexical search takes at most "
        f"{MAX_TERMS}",
    )


async def read_query(
    connection: AsyncConnection, text: str, *, is_cut: bool
) -> LexicalQuery | None:
    """Have PostgreSQL parse what a user has typed; None if there is nothing to search for.

    Args:
        connection: The connection.
        text: The query: words, "phrases", `or`, and `-` before a word that must not occur. Of a
            query over MAX_QUERY_CHARS, only the beginning is used; see `check_query`.
        is_cut: Whether to use the first MAX_TERMS words of a longer query instead of rejecting it,
            and none of a query that PostgreSQL cannot parse.

    Raises:
        InvalidArgument: the query has more than MAX_TERMS words, or PostgreSQL cannot parse it.
    """
    values = {"query": text[:MAX_QUERY_CHARS]}
    try:
        # In a savepoint if the transaction goes on after an error.
        async with connection.begin_nested() if is_cut else nullcontext():
            parsed, is_folding = (await connection.execute(_PARSE, values)).one()
            collation = None if is_folding else await find_collation(connection)
            if collation:
                statement = _parse_statement(collation)
                parsed = (await fetch_on(connection, statement, values["query"]))[0][0]
    except DBAPIError as error:
        if sqlstate(error) not in _PARSE_ERRORS:
            raise
        if is_cut:
            return None
        raise InvalidArgument.field(
            "query", "has more than 32 operators, such as `-`, in a row"
        ) from None
    node = tsquery.parse(parsed)
    if node is None:
        return None
    count = tsquery.count_terms(node)
    if count > MAX_TERMS and not is_cut:
        raise _too_many_terms_error(count)
    return derive(tsquery.first_terms(node, MAX_TERMS), collation)


@cache
def _parse_statement(collation: str) -> Statement:
    text = folded("$1::text", collation)
    return Statement.from_text(f"SELECT websearch_to_tsquery('simple', {text})::text")


def derive(node: tsquery.Node, collation: str | None = None) -> LexicalQuery:
    """Return a query with what a search needs of it."""
    wanted = tsquery.without_exclusions(node)
    words = tsquery.words(wanted)
    required = tsquery.required_words(node, MAX_COMPARED_WORDS)
    return LexicalQuery(
        matched=tsquery.render(node),
        ranked=(
            None
            if wanted is None
            else tsquery.render(tsquery.first_terms(wanted, MAX_RANKED_TERMS))
        ),
        marked=words if collation else " | ".join(tsquery.render(tsquery.Term(w)) for w in words),
        all_patterns=_patterns(required.all),
        any_patterns=_patterns(required.any),
        collation=collation,
    )


def _patterns(words: Iterable[str]) -> list[str]:
    """Return LIKE patterns for texts in lower case that contain these words."""
    escape = str.maketrans(
        # The lower case of a sigma depends on the characters around it.
        {"\\": r"\\", "%": r"\%", "_": r"\_", "\u03c3": "_", "\u03c2": "_"}
    )
    return [f"%{word.translate(escape)}%" for word in words]


def _without_long_runs(text: str) -> str:
    """Return the SQL expression of a text whose runs without white space are broken.

    PostgreSQL's parser takes a time that is quadratic in the length of a run with many of these
    characters: 5 s for 32,768 characters such as `a_a_a_`.
    """
    return f"""CASE
        WHEN {text} ~ '\\S{{200}}'
             AND char_length({text}) - char_length(translate({text}, '_~/.', '')) > 20
        THEN regexp_replace({text}, '(\\S{{100,199}}[^[:alnum:]\\s]|\\S{{200}})', '\\1 ', 'g')
        ELSE {text} END"""


@cache
def _search_statement(*, in_session: bool, collation: str | None) -> Statement:
    # Comparing text is cheap and excludes most messages; only the others are then parsed. Sizes are
    # summed before any text is parsed.
    match = "AND m.session_id = $7" if in_session else ""
    start = f"left(m.content, {MAX_TEXT_CHARS})"
    text = start if collation is None else folded(start, collation)
    return Statement.from_text(f"""
WITH newest AS (
    SELECT m.session_id, m.seq, m.created_at,
           least(octet_length(m.content), {MAX_TEXT_CHARS}) AS size
    FROM chathistory.chat_messages AS m
    WHERE m.user_id = $1 {match} AND m.deleted_at IS NULL AND m.content <> ''
      AND CASE WHEN cardinality($3::text[]) = 0 AND cardinality($4::text[]) = 0 THEN true
               ELSE (SELECT lowered.text LIKE ALL ($3::text[])
                        AND (cardinality($4::text[]) = 0 OR lowered.text LIKE ANY ($4::text[]))
                     FROM (SELECT {lowered(start, collation)} AS text OFFSET 0) AS lowered)
          END
    ORDER BY m.created_at DESC, m.session_id, m.seq DESC
    LIMIT {MAX_CANDIDATES}
), candidates AS (
    SELECT session_id, seq, sum(size) OVER (
        ORDER BY created_at DESC, session_id, seq DESC ROWS UNBOUNDED PRECEDING
    ) - size AS bytes_before
    FROM newest
)
SELECT c.session_id::text, m.id::text,
       coalesce(ts_rank_cd(v.lexemes, $5::tsquery), 0)::float8 AS rank
FROM candidates AS c
JOIN chathistory.chat_messages AS m
  ON m.user_id = $1 AND m.session_id = c.session_id AND m.seq = c.seq
CROSS JOIN LATERAL (SELECT {text} AS text OFFSET 0) AS t
CROSS JOIN LATERAL (
    SELECT to_tsvector('simple', {_without_long_runs("t.text")}) AS lexemes OFFSET 0
) AS v
WHERE c.bytes_before < {MAX_CANDIDATE_BYTES} AND v.lexemes @@ $2::tsquery
ORDER BY rank DESC, m.created_at DESC, m.session_id, m.seq DESC
LIMIT $6
""")  # noqa: S608 - only constants of this module are inserted


_message_columns = (
    Statement(sa.select(*message_columns(chat_messages.alias("m"))))
    .text.partition("FROM")[0]
    .removeprefix("SELECT ")
)


@cache
def _read_statement(collation: str | None) -> Statement:
    # ts_headline compares words in the locale C. It gets them as the text itself spells them.
    marked = "$4::tsquery" if collation is None else "spelled.query"
    spelled = (
        ""
        if collation is None
        else f"""
CROSS JOIN LATERAL (
    SELECT coalesce(
        string_agg(
            '''' || replace(replace(w.lexeme, '\\', '\\\\'), '''', '''''') || '''', ' | '
        ),
        ''
    )::tsquery AS query
    FROM unnest(to_tsvector('simple', t.text)) AS w
    WHERE btrim({folded("w.lexeme", collation)}) = ANY ($4::text[])
    OFFSET 0
) AS spelled"""  # noqa: S608 - only constants are inserted
    )
    return Statement.from_text(f"""
WITH matches AS (
    SELECT w.n, m.session_id, m.seq, m.size, sum(m.size) OVER (ORDER BY w.n) AS running_bytes
    FROM unnest($2::uuid[], $3::uuid[]) WITH ORDINALITY AS w (session_id, id, n)
    JOIN chathistory.chat_messages AS m
  ON m.user_id = $1 AND m.session_id = w.session_id AND m.id = w.id
    WHERE m.deleted_at IS NULL
)
SELECT f.session_id::text,
       substr(
           s.snippet,
           greatest(1, strpos(s.snippet, '{MATCH_START}') - {SNIPPET_LEAD_CHARS}),
           {MAX_SNIPPET_CHARS}
       ),
       {_message_columns}
FROM matches AS f
JOIN chathistory.chat_messages AS m
  ON m.user_id = $1 AND m.session_id = f.session_id AND m.seq = f.seq
CROSS JOIN LATERAL (
    SELECT translate(left(m.content, {MAX_TEXT_CHARS}), '{MATCH_START}{MATCH_END}', '  ') AS text
    OFFSET 0
) AS unbroken
CROSS JOIN LATERAL (SELECT {_without_long_runs("unbroken.text")} AS text OFFSET 0) AS t{spelled}
CROSS JOIN LATERAL (
    SELECT substr(t.text, first, {_EXCERPT_CHARS}) AS text
    FROM generate_series(1, greatest(1, char_length(t.text)), {_EXCERPT_STEP_CHARS}) AS first
    ORDER BY
        ts_rank(to_tsvector('simple', substr(t.text, first, {_EXCERPT_CHARS})), {marked}) DESC,
        first
    LIMIT 1
) AS e
CROSS JOIN LATERAL (
    SELECT ts_headline('simple', e.text, {marked}, '{_SNIPPET_OPTIONS}') AS snippet OFFSET 0
) AS s
WHERE f.running_bytes <= {MAX_PAGE_BYTES}
ORDER BY f.n
""")  # noqa: S608 - only constants of this module are inserted


async def find(
    connection: AsyncConnection,
    user_id: str,
    text: str,
    session_id: str | None,
    match_count: int,
    rank: Callable[[Sequence[Match]], Sequence[tuple[str, str]]],
    *,
    is_cut: bool,
) -> Page[MatchedMessage]:
    """Search a user's messages by words, and read those that a ranking selects.

    Args:
        connection: The connection, in a transaction.
        user_id: Owner of the messages.
        text: The query; see `read_query`.
        session_id: The session to search; None searches all.
        match_count: Matches to find; 0 if only the ranking finds messages.
        rank: Returns the (session id, message id) of the messages to read, from the matches.
        is_cut: As in `read_query`.

    Raises:
        InvalidArgument: as `read_query`.
    """
    query = await read_query(connection, text, is_cut=is_cut)
    matches: list[Match] = []
    if query is not None and match_count:
        matches = await search(connection, user_id, query, session_id, match_count)
    return await read_matches(connection, user_id, rank(matches), query)


async def search(
    connection: AsyncConnection,
    user_id: str,
    query: LexicalQuery,
    session_id: str | None,
    limit: int,
) -> list[Match]:
    """Find up to `limit` of a user's messages by words, best first, newer first at equal rank."""
    session = () if session_id is None else (session_id,)
    statement = _search_statement(in_session=bool(session), collation=query.collation)
    records = await fetch_on(
        connection,
        statement,
        user_id,
        query.matched,
        query.all_patterns,
        query.any_patterns,
        query.ranked,
        limit,
        *session,
    )
    return [Match(*record) for record in records]


async def read_matches(
    connection: AsyncConnection,
    user_id: str,
    keys: Sequence[tuple[str, str]],
    query: LexicalQuery | None,
) -> Page[MatchedMessage]:
    """Read messages by (session id, message id), in this order, up to MAX_PAGE_BYTES.

    Messages that were deleted are left out.
    """
    if not keys:
        return Page([], 0)
    session_ids = [session_id for session_id, _ in keys]
    message_ids = [message_id for _, message_id in keys]
    marked, collation = ("", None) if query is None else (query.marked, query.collation)
    statement = _read_statement(collation)
    records = await fetch_on(connection, statement, user_id, session_ids, message_ids, marked)
    matches = [
        MatchedMessage(record[0], MessageRow._make(record[2:]), record[1]) for record in records
    ]
    return Page(matches, sum(match.message.size for match in matches))
