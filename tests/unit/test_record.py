"""The checker of histories (tests/support/record.py) reports every kind of problem, and no other.

The other tests only show that it accepts correct histories.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.history import History, StoredMessage
from tests.support.record import MISSING, Edit, Erasure, Record, Sent, View, judge

FOREVER = float("inf")


def sent(begun: float, acknowledged: float | None, **seqs: int) -> Sent:
    """Return a request with these message ids and seqs; None if it was not acknowledged."""
    reply = {id_: (seq, seq * 10) for id_, seq in seqs.items()}
    return Sent(tuple(seqs), begun, [] if acknowledged is None else [(acknowledged, reply)])


def stored(*ids: str, deleted: frozenset[str] = frozenset()) -> History:
    rows = [
        StoredMessage(
            seq, id_, "" if id_ in deleted else f"{id_} says", seq * 10, b"", id_ in deleted
        )
        for seq, id_ in enumerate(ids, 1)
    ]
    return History(1, len(rows), len(rows) - len(deleted), rows)


def good_record() -> Record:
    """Return the record of five messages and some reads.

    Message d was never acknowledged, and message b was deleted.
    """
    record = Record("user", "session")
    record.sent = [sent(0, 1, a=1, b=2), sent(2, 5, c=3), sent(3, None, d=4), sent(6, 7, e=5)]
    record.sent[1].answers.append((9, {"c": (3, 30)}))
    record.erasures = [Erasure("b", 7, 8)]
    record.views = [
        View(1.5, 1.6, 0, ((1, "a"), (2, "b")), to_end=True, last_seq=2),
        View(2.5, 4, 0, ((1, "a"), (2, "b"), (3, "c")), to_end=True),
        View(7.5, 7.6, 1, ((2, "b"), (3, "c"), (4, "d"), (5, "e")), to_end=True, last_seq=5),
        View(8.5, 8.6, 0, ((1, "a"), (3, "c"), (4, "d"), (5, "e")), to_end=True),
        View(0, 9, 2, ((3, "c"), (4, "d")), to_end=False),
    ]
    return record


def good() -> History:
    return stored("a", "b", "c", "d", "e", deleted=frozenset("b"))


def replaced(history: History, replaced_seq: int, /, **fields: object) -> History:
    rows = [
        row._replace(**fields) if row.seq == replaced_seq else row  # type: ignore[arg-type]
        for row in history.messages
    ]
    return history._replace(messages=rows)


def kinds(record: Record, history: History | None) -> set[str]:
    return {problem.kind for problem in judge(record, history)}


def test_history_that_agrees_with_the_record_is_accepted() -> None:
    assert judge(good_record(), good()) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), None) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), stored()) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), stored("a")) == []


BROKEN: dict[str, tuple[str, Callable[[], History | None]]] = {
    "session missing": ("LOST", lambda: None),
    "last message missing": ("LOST", lambda: stored(*"abcd", deleted=frozenset("b"))),
    "another message has its seq": ("LOST", lambda: replaced(good(), 3, id="x", content="x says")),
    "message missing, later ones moved up": ("MOVED", lambda: stored(*"acde")),
    "message stored twice": ("DOUBLED", lambda: stored(*"abcdec", deleted=frozenset("b"))),
    "two messages with one seq": ("DOUBLED", lambda: replaced(good(), 5, seq=4)),
    "seq skipped": ("GAP", lambda: replaced(good(), 5, seq=6)),
    "last_seq too high": ("GAP", lambda: good()._replace(last_seq=6)),
    "wrong message_count": ("MOVED", lambda: good()._replace(message_count=5)),
    "two messages swapped": ("MOVED", lambda: stored(*"abdce", deleted=frozenset("b"))),
    "time differs from the reply": ("MOVED", lambda: replaced(good(), 3, created_us=31)),
    "times decrease": ("ORDER", lambda: replaced(good(), 4, created_us=29)),
    "content of another message": ("MOVED", lambda: replaced(good(), 3, content="d says")),
    "message that was never sent": ("STRANGE", lambda: stored(*"abcdex", deleted=frozenset("b"))),
    "message deleted without a request": (
        "LOST",
        lambda: stored(*"abcde", deleted=frozenset("bc")),
    ),
    "deleted message restored": ("MOVED", lambda: stored(*"abcde")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_history_is_reported(name: str) -> None:
    kind, history = BROKEN[name]
    assert kind in kinds(good_record(), history())


def test_reply_without_the_positions_of_its_messages_is_reported() -> None:
    record = good_record()
    record.sent[1].answers.append((10, {"c": MISSING}))
    assert kinds(record, good()) == {"LOST"}


EDITS = [
    Edit("c", "c first", 10, 11),
    Edit("c", "c second", 12, 13),
    Edit("c", "c not acknowledged", 12.5),
    Edit("", "title", 10, 11),
]
CHANGED: dict[str, tuple[str | None, str, str]] = {
    "last acknowledged edit": (None, "c second", "title"),
    "edit without acknowledgement": (None, "c not acknowledged", "title"),
    "earlier edit": ("LOST", "c first", "title"),
    "no edit": ("LOST", "c says", "title"),
    "title not edited": ("LOST", "c second", ""),
}


@pytest.mark.parametrize("name", CHANGED)
def test_stored_edits_must_follow_their_acknowledgements(name: str) -> None:
    kind, content, title = CHANGED[name]
    record = good_record()
    record.edits = EDITS
    edited = replaced(good(), 3, content=content)._replace(title=title)
    assert kinds(record, edited) == ({kind} if kind else set())


def test_overlapping_edits_may_end_in_either_order() -> None:
    record = good_record()
    record.edits = [Edit("c", "c first", 10, 12), Edit("c", "c second", 11, 13)]
    for content in ("c first", "c second"):
        assert judge(record, replaced(good(), 3, content=content)) == []


def test_message_acknowledged_with_two_seqs_is_reported() -> None:
    record = good_record()
    record.sent[1].answers.append((10, {"c": (6, 60)}))
    assert kinds(record, good()) == {"MOVED"}


@pytest.mark.parametrize("ids", ["abd", "abcxd"], ids=["only a part", "another message between"])
def test_partially_stored_request_is_reported(ids: str) -> None:
    record = Record(
        "user", "session", [sent(0, 1, a=1, b=2), sent(2, None, c=3, d=4), sent(2, None, x=3)]
    )
    assert "TORN" in kinds(record, stored(*ids))


def test_append_sent_after_an_acknowledgement_must_have_a_higher_seq() -> None:
    record = Record("user", "session", [sent(0, 1, a=2), sent(2, 3, b=1)])
    assert kinds(record, stored("b", "a")) == {"ORDER"}
    record.sent[1].begun = 0.5
    assert kinds(record, stored("b", "a")) == set()


ACDE = ((1, "a"), (3, "c"), (4, "d"), (5, "e"))
WRONG: dict[str, tuple[str, View]] = {
    "acknowledged message missing": (
        "STALE",
        View(7.2, 7.4, 0, ((1, "a"), (2, "b"), (3, "c"), (4, "d")), True),
    ),
    "empty": ("STALE", View(7.2, 7.4, 0, (), True)),
    "last_seq too low": ("STALE", View(7.2, 7.4, 0, (), False, 4)),
    "last_seq never reached": ("VIEW", View(7.2, 7.4, 0, (), False, 6)),
    "deleted message shown": ("STALE", View(8.1, 8.2, 0, (*ACDE[:1], (2, "b"), *ACDE[1:]), True)),
    "message missing before its deletion": (
        "STALE",
        View(6.5, 6.6, 0, ((1, "a"), (3, "c"), (4, "d")), True),
    ),
    "message skipped": ("VIEW", View(0, 9, 2, ((3, "c"), (5, "e")), False)),
    "first message skipped": ("VIEW", View(0, 9, 2, ((4, "d"),), False)),
    "message shown twice": ("VIEW", View(0, 9, 2, ((3, "c"), (3, "c"), (4, "d")), False)),
    "message out of order": ("VIEW", View(0, 9, 2, ((4, "d"), (3, "c")), False)),
    "another message has its seq": ("VIEW", View(0, 9, 2, ((3, "d"),), False)),
    "message that is not stored": ("VIEW", View(0, 9, 5, ((6, "x"),), False)),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_view_is_reported(name: str) -> None:
    kind, view = WRONG[name]
    record = good_record()
    record.views = [view]
    assert kinds(record, good()) == {kind}


def test_view_need_not_show_later_messages() -> None:
    record = good_record()
    record.views = [
        View(4, 4.5, 0, ((1, "a"), (2, "b")), True),
        View(FOREVER, FOREVER, 0, ACDE, True, 5),
    ]
    assert judge(record, good()) == []
