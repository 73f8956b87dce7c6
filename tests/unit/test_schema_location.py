"""The choice of the schema, from those that hold our tables."""

from __future__ import annotations

import pytest

from service.store.schema.location import Location, UnusableDatabase


def location(*usable: str, unusable: tuple[str, ...] = (), encoding: str = "UTF8") -> Location:
    return Location(encoding, "app", usable, unusable)


@pytest.mark.parametrize(
    ("candidates", "configured", "current", "expected"),
    [
        (location(), None, None, "chathistory"),
        (location("public"), None, None, "public"),
        (location("public"), "chat", None, "chat"),
        (location("public", "chathistory"), "chathistory", None, "chathistory"),
        (location(unusable=("other",)), "chat", None, "chat"),
        (location("public", unusable=("other",)), None, None, "public"),
    ],
    ids=["new", "found", "configured", "one of two", "configured, not usable", "usable"],
)
def test_first_choice(
    candidates: Location, configured: str | None, current: str | None, expected: str
) -> None:
    assert candidates.choose(configured, current) == expected


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (location("public", "chathistory"), "public"),
        (location("moved"), "moved"),
        (location(), "public"),
    ],
    ids=["a second installation", "the tables were moved", "the tables were dropped"],
)
def test_choice_of_a_running_service_that_uses_public(candidates: Location, expected: str) -> None:
    assert candidates.choose(None, "public") == expected


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        (location("a", "b"), "the schemas a, b hold tables.*CHAT_HISTORY_DB_SCHEMA"),
        (location(unusable=("a",)), "GRANT USAGE ON SCHEMA a"),
    ],
)
def test_schema_that_is_not_clear_is_refused(candidates: Location, words: str) -> None:
    with pytest.raises(UnusableDatabase, match=words):
        candidates.choose(None)


def test_other_encodings_are_refused_with_the_command() -> None:
    location().check_encoding()
    with pytest.raises(UnusableDatabase, match=r"LATIN1.*CREATE DATABASE app_utf8 ENCODING 'UTF8'"):
        location(encoding="LATIN1").check_encoding()
