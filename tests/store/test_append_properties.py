"""Appends are linearizable: the outcome is that of one operation after the other, in some order.

Two stores, each with its own connections, work on one database, and connections may break.
`tests/support/appends.py` judges the outcome.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store.append import batches
from service.store.db.database import Database
from service.store.tables import SessionState
from tests.support.appends import (
    CANCELLED,
    ERASED,
    NAMES,
    Add,
    Content,
    Done,
    EraseMessage,
    EraseSession,
    Operation,
    SetState,
    Step,
    Word,
    World,
    explain,
    new_user,
    play,
    stores,
)
from tests.support.commit_faults import arm, install
from tests.support.proxy import Direction, Link, Proxy, postgres_proxy

# --- Strategies.

_words = st.lists(
    st.builds(Word, st.integers(0, NAMES - 1), st.sampled_from([0, 0, 0, 0, 1])),
    min_size=1,
    max_size=3,
    unique_by=lambda word: word.name,
).map(tuple)
_adds = st.builds(
    Add,
    words=_words,
    expected=st.none() | st.none() | st.integers(0, 5),
    may_create=st.booleans(),
    has_derived_id=st.sampled_from([False, False, True]),
)
_leaving = st.builds(Add, words=_words, may_create=st.booleans(), cancel_after=st.integers(0, 40))
_others = st.one_of(
    st.just(EraseSession()),
    st.builds(EraseMessage, st.integers(0, NAMES - 1)),
    st.builds(
        SetState, st.sampled_from([SessionState.ARCHIVED, SessionState.ACTIVE, SessionState.ACTIVE])
    ),
)


def _bursts(
    operations: st.SearchStrategy[Operation], size: int
) -> st.SearchStrategy[list[list[Step]]]:
    step = st.builds(
        Step, st.integers(0, 1), st.integers(0, 1), st.sampled_from([0, 0, 0, 1, 5, 30]), operations
    )
    return st.lists(st.lists(step, min_size=1, max_size=size), min_size=1, max_size=3)


# --- Fixtures: a test keeps its stores, and each of its examples has its own user.


@pytest.fixture
async def databases(database_url: str) -> AsyncGenerator[list[Database]]:
    async with stores(database_url, database_url) as opened:
        yield opened


@pytest.fixture
async def cut_off(database_url: str) -> AsyncGenerator[tuple[list[Database], Cutter]]:
    """Two stores whose connections break."""
    async with postgres_proxy(database_url) as (proxy, url), stores(url, url) as opened:
        yield opened, Cutter(proxy)


# --- Properties: dozens of examples in every run, hundreds with -m faults.


def _at_length(test: Any) -> Any:
    return pytest.mark.faults(pytest.mark.timeout(900)(test))


def test_search_for_an_order_rejects_impossible_answers() -> None:
    """`explain` must reject a lost message, a gap, a duplicate and an answer that is too early."""
    word, other = Word(0, 0), Word(1, 0)
    first = Done(Add((word,), may_create=True), ("added", True, ((1, False),)), 0, 1)
    assert explain(None, Content(words=(word,)), [first])
    assert not explain(None, None, [first])
    assert not explain(None, Content(words=(word, other)), [first])
    again = Done(Add((word,)), ("added", False, ((1, False),)), 0, 1)
    assert not explain(Content(words=(word,)), Content(words=(word,)), [again])
    late = Done(Add((other,)), ("added", False, ((1, False),)), 2, 3)
    assert not explain(
        Content(),
        Content(words=(other, word)),
        [Done(Add((word,)), ("added", False, ((2, False),)), 0, 1), late],
    )
    unknown = Done(Add((word,), may_create=True), CANCELLED, 0, math.inf)
    assert explain(None, None, [unknown])
    assert explain(None, Content(words=(word,)), [unknown])
    assert not explain(None, Content(words=(word, word)), [unknown])
    restored = Content(words=(word,), has_tombstone=True)
    retry = Done(Add((word,), has_derived_id=True), ("added", True, ((1, False),)), 0, 1)
    assert not explain(ERASED, restored, [retry])
    afresh = Done(Add((word,), may_create=True), ("added", True, ((1, False),)), 0, 1)
    assert explain(ERASED, restored, [afresh])


async def _any_interleaving(
    database_url: str,
    databases: list[Database],
    monkeypatch: pytest.MonkeyPatch,
    batch_messages: int,
    bursts: list[list[Step]],
    lanes: int,
    search_enabled: bool,
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_MESSAGES", batch_messages)
    await play(
        World(
            database_url,
            databases,
            await new_user(database_url),
            lanes=lanes,
            search_enabled=search_enabled,
        ),
        bursts,
    )


_interleavings = given(
    bursts=_bursts(st.one_of(_adds, _adds, _adds, _leaving, _others), 10),
    lanes=st.integers(1, 2),
    search_enabled=st.booleans(),
)
_widths = pytest.mark.parametrize("batch_messages", [512, 2], ids=["wide", "narrow"])
test_concurrent_appends_equal_some_serial_order = _widths(
    settings(max_examples=40)(_interleavings(_any_interleaving))
)
test_concurrent_appends_equal_some_serial_order_at_length = _at_length(
    _widths(settings(max_examples=600)(_interleavings(_any_interleaving)))
)


async def _fails_at_its_commit(
    database_url: str,
    databases: list[Database],
    bursts: list[list[Step]],
    kind: str,
    counts: list[int],
) -> None:
    """Serialization failures, deadlocks and ended backends, just before a commit."""
    await install(database_url)
    left = iter(counts)

    async def prepare() -> None:
        await arm(database_url, kind, next(left))

    world = World(database_url, databases, await new_user(database_url))
    await play(world, bursts, flags=kind != "terminate", prepare=prepare)


_commit_failures = given(
    bursts=_bursts(st.one_of(_adds, _adds, _adds, _leaving, _others), 8),
    kind=st.sampled_from(["40001", "40P01", "terminate"]),
    counts=st.lists(st.integers(0, 6), min_size=3, max_size=3),
)
test_append_whose_commit_fails_is_retried = settings(max_examples=10)(
    _commit_failures(_fails_at_its_commit)
)
test_append_whose_commit_fails_is_retried_at_length = _at_length(
    settings(max_examples=100)(_commit_failures(_fails_at_its_commit))
)


class Cut(NamedTuple):
    """A connection that breaks: at which piece that is sent to the server, and where exactly."""

    piece: int
    where: str


class Cutter:
    """Breaks connections as drawn; what has been sent counts from `begin`."""

    def __init__(self, proxy: Proxy) -> None:
        self._cuts: dict[int, str] = {}
        self._doomed: set[Link] = set()
        self._sent = 0
        proxy.tap = self._tap

    def begin(self, cuts: Iterable[Cut]) -> None:
        self._cuts = {cut.piece: cut.where for cut in cuts}
        self._doomed.clear()
        self._sent = 0

    def _tap(self, link: Link, way: Direction, _piece: bytes) -> bool:
        if way is Direction.TO_CLIENT:
            if link in self._doomed:
                link.reset()  # Committed, and the response is lost.
                return False
            return True
        self._sent += 1
        match self._cuts.get(self._sent):
            case "unsent":
                link.reset()
                return False
            case "unanswered":
                self._doomed.add(link)
            case "half":
                # The statement runs, and its response will be lost.
                asyncio.get_running_loop().call_soon(link.reset_client)
        return True


_cuts = st.lists(
    st.builds(Cut, st.integers(1, 12), st.sampled_from(["unsent", "unanswered", "half"])),
    max_size=4,
)


async def _lost_on_the_way(
    database_url: str,
    cut_off: tuple[list[Database], Cutter],
    bursts: list[list[Step]],
    cuts: list[list[Cut]],
) -> None:
    """Connections break before a statement is sent, while it runs, and after its commit."""
    databases, cutter = cut_off
    left = iter(cuts)

    async def prepare() -> None:
        cutter.begin(next(left))

    cutter.begin([])
    world = World(database_url, databases, await new_user(database_url))
    await play(world, bursts, flags=False, prepare=prepare)


_losses = given(
    bursts=_bursts(st.one_of(_adds, _adds, _leaving), 8),
    cuts=st.lists(_cuts, min_size=3, max_size=3),
)
test_append_with_a_lost_connection_is_stored_once = settings(max_examples=10)(
    _losses(_lost_on_the_way)
)
test_append_with_a_lost_connection_is_stored_once_at_length = _at_length(
    settings(max_examples=200)(_losses(_lost_on_the_way))
)
