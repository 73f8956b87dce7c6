"""Lower case in any script, whatever the locale of the database.

In a database with the locale C, `lower` and the text search parser know the letters A to Z only.
The statements of lexical search then convert texts by a collation of the server that knows all
scripts. A database whose own locale does this pays nothing.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.hot_pool import Statement, fetch_on

_CAPITAL, _SMALL = "\u00d6", "\u00f6"
"""A letter in both cases. A locale that knows it knows the other scripts, too."""

_COLLATIONS = ("pg_c_utf8", "und-x-icu", "C.utf8", "C.UTF-8", "en_US.utf8", "en_US.UTF-8")
"""Collations that know all scripts, best first: of PostgreSQL 17, of ICU, and of the C library."""
_FIND_COLLATION = Statement.from_text(f"""
SELECT quote_ident(c.collname)
FROM pg_catalog.pg_collation AS c
WHERE c.collnamespace = 'pg_catalog'::regnamespace AND getdatabaseencoding() = 'UTF8'
  AND c.collencoding IN (-1, pg_char_to_encoding('UTF8'))
  AND c.collname = ANY (ARRAY{list(_COLLATIONS)}::text[])
ORDER BY array_position(ARRAY{list(_COLLATIONS)}::text[], c.collname::text)
LIMIT 1
""")  # noqa: S608 - only constants are inserted

# Characters outside of ASCII that separate words. In the locale C, PostgreSQL's parser takes all
# characters outside of ASCII for letters. Joiners (U+200C and U+200D) are parts of words.
_SEPARATORS = (
    "\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7"
    "\u2000-\u200b\u200e-\u206f\u20a0-\u20cf\u2190-\u2bff\u2e00-\u2e7f"
    "\u3000-\u3004\u3008-\u3020\u3030\ufe30-\ufe6f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    "\uff5b-\uff65\U0001f300-\U0001faff"
)


def folds_case() -> sa.ColumnElement[bool]:
    """Return the expression of whether the database's own text search ignores case."""
    capital = sa.bindparam("capital", _CAPITAL, type_=sa.Text())
    vector = sa.cast(sa.func.to_tsvector("simple", capital), sa.Text)
    return vector == sa.bindparam("folded", f"'{_SMALL}':1", type_=sa.Text())


async def find_collation(connection: AsyncConnection) -> str | None:
    """Return the quoted name of a collation that knows all scripts, if the server has one."""
    records = await fetch_on(connection, _FIND_COLLATION)
    return records[0][0] if records else None


def lowered(text: str, collation: str | None) -> str:
    """Return the SQL expression of a text in lower case, by a collation or by the database."""
    return f"lower({text})" if collation is None else f"lower({text} COLLATE {collation})"


def folded(text: str, collation: str) -> str:
    """Return the SQL expression of a text in lower case whose words are separated by ASCII."""
    return f"regexp_replace({lowered(text, collation)}, '[{_SEPARATORS}]', ' ', 'g')"
