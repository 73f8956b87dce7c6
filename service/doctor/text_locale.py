"""Checks whether lexical search ignores the case of letters in every script."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.doctor.findings import Finding, Verdict
from service.store.letter_case import find_collation, folds_case


class TextLocale(NamedTuple):
    """The knowledge of letters that a database has."""

    folds_case: bool = True
    """Whether its own locale knows the letters of all scripts."""
    collation: str | None = None
    """A collation of the server that knows them, if the locale does not."""


async def read_text_locale(connection: AsyncConnection) -> TextLocale:
    """Find out whether the database's locale knows all letters.

    Args:
        connection: A transaction has begun on it, and it has the option `schema_translate_map`.
    """
    if await connection.scalar(sa.select(folds_case())):
        return TextLocale()
    return TextLocale(False, await find_collation(connection))


def check_text_locale(locale: TextLocale) -> list[Finding]:
    """Return the finding on a locale that knows the letters A to Z only."""
    if locale.folds_case:
        return []
    message = "the database's locale knows the letters A to Z only, as C does"
    if locale.collation is not None:
        return [
            Finding("locale", f"{message}: lexical search uses the collation {locale.collation}")
        ]
    message += (
        ", and the server has no collation that knows others: lexical search finds words such as "
        "KÖLN in the same case only; create a database with LOCALE 'C.UTF-8' TEMPLATE template0, "
        "and restore a dump into it"
    )
    return [Finding("locale", message, Verdict.NOTE)]
