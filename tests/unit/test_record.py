"""The judge of histories can fail: each way in which a service could break its word is found, and a clean history is not accused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.history import History, StoredMessage
from tests.support.record import MISSING, Edit, Erasure, Record, Sent, View, judge

FOREVER = float("inf")


def sent(begun: float, acknowledged: float | None, **places: int) -> Sent:
    """Make a request of messages at these places; nobody heard of it when it was not acknowledged."""
    told = {id_: (seq, seq * 10) for id_, seq in places.items()}
    return Sent(tuple(places), begun, [] if acknowledged is None else [(acknowledged, told)])


def stored(*ids: str, deleted: frozenset[str] = frozenset()) -> History:
    rows = [
        StoredMessage(
            seq, id_, "" if id_ in deleted else f"{id_} says", seq * 10, b"", id_ in deleted
        )
        for seq, id_ in enumerate(ids, 1)
    ]
    return History(1, len(rows), len(rows) - len(deleted), rows)


def record() -> Record:
    """Make what five messages, one of which was never acknowledged and one erased, and some readers left."""
    made = Record("user", "session")
    made.sent = [sent(0, 1, a=1, b=2), sent(2, 5, c=3), sent(3, None, d=4), sent(6, 7, e=5)]
    made.sent[1].answers.append((9, {"c": (3, 30)}))
    made.erasures = [Erasure("b", 7, 8)]
    made.views = [
        View(1.5, 1.6, 0, ((1, "a"), (2, "b")), to_end=True, last_seq=2),
        View(2.5, 4, 0, ((1, "a"), (2, "b"), (3, "c")), to_end=True),
        View(7.5, 7.6, 1, ((2, "b"), (3, "c"), (4, "d"), (5, "e")), to_end=True, last_seq=5),
        View(8.5, 8.6, 0, ((1, "a"), (3, "c"), (4, "d"), (5, "e")), to_end=True),
        View(0, 9, 2, ((3, "c"), (4, "d")), to_end=False),
    ]
    return made


def good() -> History:
    return stored("a", "b", "c", "d", "e", deleted=frozenset("b"))


def replaced(history: History, place: int, **fields: object) -> History:
    rows = [row._replace(**fields) if row.seq == place else row for row in history.messages]  # type: ignore[arg-type]
    return history._replace(messages=rows)


def kinds(made: Record, history: History | None) -> set[str]:
    return {problem.kind for problem in judge(made, history)}


def test_history_that_agrees_with_the_record_is_accepted() -> None:
    assert judge(record(), good()) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), None) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), stored()) == []
    assert judge(Record("user", "session", [sent(0, None, a=1)]), stored("a")) == []


BROKEN: dict[str, tuple[str, Callable[[], History | None]]] = {
    "the session is gone": ("LOST", lambda: None),
    "the last message is gone": ("LOST", lambda: stored("a", "b", "c", "d", deleted=frozenset("b"))),
    "another one is in its place": ("LOST", lambda: replaced(good(), 3, id="x", content="x says")),
    "one is gone and seq closed up": ("MOVED", lambda: stored("a", "c", "d", "e")),
    "one is stored twice": ("DOUBLED", lambda: stored("a", "b", "c", "d", "e", "c", deleted=frozenset("b"))),
    "two have one seq": ("DOUBLED", lambda: replaced(good(), 5, seq=4)),
    "a seq is left out": ("GAP", lambda: replaced(good(), 5, seq=6)),
    "the session counts on": ("GAP", lambda: good()._replace(last_seq=6)),
    "the count of messages is wrong": ("MOVED", lambda: good()._replace(message_count=5)),
    "two have changed places": ("MOVED", lambda: stored("a", "b", "d", "c", "e", deleted=frozenset("b"))),
    "a time is not that which was told": ("MOVED", lambda: replaced(good(), 3, created_us=31)),
    "times go backwards": ("ORDER", lambda: replaced(good(), 4, created_us=29)),
    "it says what another said": ("MOVED", lambda: replaced(good(), 3, content="d says")),
    "one that nobody sent": ("STRANGE", lambda: stored("a", "b", "c", "d", "e", "x", deleted=frozenset("b"))),
    "one is erased unasked": ("LOST", lambda: stored("a", "b", "c", "d", "e", deleted=frozenset("bc"))),
    "an erased one is back": ("MOVED", lambda: stored("a", "b", "c", "d", "e")),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_history_is_reported(name: str) -> None:
    kind, history = BROKEN[name]
    assert kind in kinds(record(), history())


def test_reply_without_the_positions_of_its_messages_is_reported() -> None:
    made = record()
    made.sent[1].answers.append((10, {"c": MISSING}))
    assert kinds(made, good()) == {"LOST"}


EDITS = [
    Edit("c", "c first", 10, 11),
    Edit("c", "c second", 12, 13),
    Edit("c", "c never heard of", 12.5),
    Edit("", "title", 10, 11),
]
CHANGED: dict[str, tuple[str | None, str, str]] = {
    "the last of them": (None, "c second", "title"),
    "one that nobody heard of": (None, "c never heard of", "title"),
    "an earlier one": ("LOST", "c first", "title"),
    "none of them": ("LOST", "c says", "title"),
    "not the title": ("LOST", "c second", ""),
}


@pytest.mark.parametrize("name", CHANGED)
def test_stored_edits_must_follow_their_acknowledgements(name: str) -> None:
    kind, content, title = CHANGED[name]
    made = record()
    made.edits = EDITS
    changed = replaced(good(), 3, content=content)._replace(title=title)
    assert kinds(made, changed) == ({kind} if kind else set())


def test_overlapping_edits_may_end_in_either_order() -> None:
    made = record()
    made.edits = [Edit("c", "c first", 10, 12), Edit("c", "c second", 11, 13)]
    assert judge(made, replaced(good(), 3, content="c first")) == []


def test_message_acknowledged_with_two_seqs_is_reported() -> None:
    made = record()
    made.sent[1].answers.append((10, {"c": (6, 60)}))
    assert kinds(made, good()) == {"MOVED"}


@pytest.mark.parametrize("ids", ["abd", "abcxd"], ids=["half of it", "something between"])
def test_partially_stored_request_is_reported(ids: str) -> None:
    made = Record(
        "user", "session", [sent(0, 1, a=1, b=2), sent(2, None, c=3, d=4), sent(2, None, x=3)]
    )
    assert "TORN" in kinds(made, stored(*ids))


def test_one_that_was_acknowledged_first_lies_behind() -> None:
    made = Record("user", "session", [sent(0, 1, a=2), sent(2, 3, b=1)])
    assert kinds(made, stored("b", "a")) == {"ORDER"}
    made.sent[1].begun = 0.5
    assert kinds(made, stored("b", "a")) == set()


ABC = ((1, "a"), (3, "c"), (4, "d"), (5, "e"))
WRONG: dict[str, tuple[str, View]] = {
    "an acknowledged one is not shown": (
        "STALE",
        View(7.2, 7.4, 0, ((1, "a"), (2, "b"), (3, "c"), (4, "d")), True),
    ),
    "nothing is shown": ("STALE", View(7.2, 7.4, 0, (), True)),
    "last_seq is of the past": ("STALE", View(7.2, 7.4, 0, (), False, 4)),
    "last_seq is of no time": ("VIEW", View(7.2, 7.4, 0, (), False, 6)),
    "an erased one is shown": ("STALE", View(8.1, 8.2, 0, (*ABC[:1], (2, "b"), *ABC[1:]), True)),
    "one is missing before it was erased": (
        "STALE",
        View(6.5, 6.6, 0, ((1, "a"), (3, "c"), (4, "d")), True),
    ),
    "one is left out": ("VIEW", View(0, 9, 2, ((3, "c"), (5, "e")), False)),
    "the first is left out": ("VIEW", View(0, 9, 2, ((4, "d"),), False)),
    "one comes twice": ("VIEW", View(0, 9, 2, ((3, "c"), (3, "c"), (4, "d")), False)),
    "one comes late": ("VIEW", View(0, 9, 2, ((4, "d"), (3, "c")), False)),
    "another one is at its place": ("VIEW", View(0, 9, 2, ((3, "d"),), False)),
    "one that is not stored": ("VIEW", View(0, 9, 5, ((6, "x"),), False)),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_view_is_reported(name: str) -> None:
    kind, view = WRONG[name]
    made = record()
    made.views = [view]
    assert kinds(made, good()) == {kind}


def test_view_need_not_show_later_messages() -> None:
    made = record()
    made.views = [
        View(4, 4.5, 0, ((1, "a"), (2, "b")), True),
        View(FOREVER, FOREVER, 0, ABC, True, 5),
    ]
    assert judge(made, good()) == []
