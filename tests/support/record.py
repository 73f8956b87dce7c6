"""What clients did to a session and what they were told, and the judge of it: what is stored must explain all of it.

A record is made while a test runs, in any order and by any number of clients, on one clock. `judge` compares it afterwards, when nothing
is under way any more, with what is stored. It looks for what the service promises:

- every acknowledged message is there once, where and when its acknowledgement said, also when it was acknowledged twice;
- of what was not acknowledged each request is there whole, its messages next to each other, or not at all, and nothing else is there;
- `seq` is 1, 2, 3… without gap, and an append that was acknowledged before another began has the lower place;
- a change that was acknowledged is there, unless another one that may have come after it is;
- every view agrees with what is stored, lacks nothing that was acknowledged before it began, and shows nothing that had been erased.

A message's content begins with its id (`said`), so that contents that were mixed up are found too.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

from chathistory.v1 import message_pb2, session_pb2

from tests.support.chat import new_id, new_message
from tests.support.history import History

Place = tuple[int, str]
"""A message's seq and id, as somebody was shown them."""
NOWHERE = (0, 0)
"""The seq and time of a message that an answer left out."""


class Problem(NamedTuple):
    """One thing that must not be."""

    kind: str
    """LOST, DOUBLED, GAP, MOVED, TORN, STRANGE, ORDER, VIEW or STALE."""
    words: str


@dataclass(slots=True)
class Sent:
    """An append of new messages, however often it was sent."""

    ids: tuple[str, ...]
    begun: float = field(default_factory=time.monotonic)
    answers: list[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=list)
    """When it was acknowledged, and then by id the seq and the time (microseconds since 1970) of each message."""

    @property
    def acknowledged(self) -> float:
        """When it was first acknowledged."""
        return self.answers[0][0] if self.answers else math.inf

    def acknowledge(self, reply: message_pb2.AppendMessagesResponse) -> None:
        """Note an answer; messages of other requests in it are theirs to note."""
        places = {
            entry.id: (entry.seq, entry.create_time.ToMicroseconds()) for entry in reply.messages
        }
        self.answers.append((time.monotonic(), {id_: places.get(id_, NOWHERE) for id_ in self.ids}))

    @property
    def last_seq(self) -> int:
        """The highest place that was acknowledged, or 0."""
        return max((seq for _, places in self.answers for seq, _ in places.values()), default=0)


@dataclass(slots=True)
class Erasure:
    """A message that was to be erased."""

    id: str
    begun: float = field(default_factory=time.monotonic)
    acknowledged: float = math.inf


@dataclass(slots=True)
class Edit:
    """A new content of a message, or a new title of the session."""

    id: str
    """The message's; empty for the title."""
    value: str
    begun: float = field(default_factory=time.monotonic)
    acknowledged: float = math.inf


class View(NamedTuple):
    """What a reader was shown: all of a range of a session, but for what is erased."""

    begun: float
    ended: float
    after: int
    """The range begins behind this seq."""
    shown: tuple[Place, ...]
    to_end: bool
    """Whether it claimed to show everything there is behind `after`."""
    last_seq: int | None = None
    """What the session's `last_seq` was said to be."""


@dataclass(slots=True)
class Record:
    """What was done to one session."""

    user_id: str
    session_id: str
    sent: list[Sent] = field(default_factory=list)
    erasures: list[Erasure] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    @property
    def name(self) -> dict[str, Any]:
        """The fields of a request that name the session."""
        return {"user_id": self.user_id, "session_id": self.session_id}

    @property
    def acknowledged(self) -> int:
        """How many messages were acknowledged."""
        return sum(len(sent.ids) for sent in self.sent if sent.answers)

    @property
    def last_seq(self) -> int:
        """The highest place that was acknowledged, or 0."""
        return max((sent.last_seq for sent in self.sent), default=0)

    def send(self, messages: Iterable[message_pb2.Message]) -> Sent:
        """Note that new messages are sent, before they are."""
        sent = Sent(tuple(message.id for message in messages))
        self.sent.append(sent)
        return sent

    def edit(self, id_: str, value: str) -> Edit:
        """Note that a message's content, or the title (by an empty id), is to become another, before that is asked for."""
        edit = Edit(id_, value)
        self.edits.append(edit)
        return edit

    def erasing(self, id_: str) -> bool:
        """Whether somebody has asked for the erasure of a message."""
        return any(erasure.id == id_ for erasure in self.erasures)

    def saw_page(self, begun: float, after: int, page: message_pb2.ListMessagesResponse) -> None:
        """Note a page in ascending order."""
        self._saw(begun, after, page.messages, to_end=not page.next_page_token)

    def saw_newest(self, begun: float, page: message_pb2.ListMessagesResponse) -> None:
        """Note the first page in descending order."""
        messages = list(reversed(page.messages))
        after = messages[0].seq - 1 if messages and page.next_page_token else 0
        self._saw(begun, after, messages, to_end=True)

    def saw_context(self, begun: float, context: message_pb2.GetContextResponse) -> None:
        """Note a context of messages that need not stay together."""
        after = context.messages[0].seq - 1 if context.messages and context.omitted_count else 0
        self._saw(begun, after, context.messages, to_end=True, session=context.session)

    def saw_session(self, begun: float, session: session_pb2.Session) -> None:
        """Note a session itself."""
        self._saw(begun, 0, (), to_end=False, session=session)

    def saw_stream(self, begun: float, after: int, messages: Iterable[Place]) -> None:
        """Note what a watch sent from its beginning to its end."""
        self.views.append(View(begun, time.monotonic(), after, tuple(messages), to_end=False))

    def _saw(
        self,
        begun: float,
        after: int,
        messages: Iterable[message_pb2.Message],
        *,
        to_end: bool,
        session: session_pb2.Session | None = None,
    ) -> None:
        last_seq = None if session is None else session.last_seq
        self.views.append(
            View(begun, time.monotonic(), after, tuple(map(place, messages)), to_end, last_seq)
        )


def said(
    size: int, role: message_pb2.Role.ValueType = message_pb2.ROLE_USER
) -> message_pb2.Message:
    """Make a message of at least so many characters, which begins with its own id."""
    id_ = new_id()
    return new_message(f"{id_} ".ljust(size, "x"), role, id=id_)


def place(message: message_pb2.Message) -> Place:
    """Return what a reader was shown of a message."""
    own = message.content.startswith(message.id)
    return (
        message.seq,
        message.id if own else f"{message.id} with other content: {message.content[:36]}",
    )


def judge(record: Record, stored: History | None) -> list[Problem]:
    """Return what is stored and should not be, or the other way round, or was shown and cannot be."""
    if stored is None:
        return (
            [Problem("LOST", f"session {record.session_id}")]
            if record.acknowledged or record.views
            else []
        )
    looks = (
        _rows(stored),
        _counts(stored),
        _places(record, stored),
        _erased(record, stored),
        _edited(record, stored),
        _order(record, stored),
        _views(record, stored),
    )
    problems = chain(*looks)
    return [Problem(kind, f"session {record.session_id}: {words}") for kind, words in problems]


def _rows(stored: History) -> Iterator[Problem]:
    """Look at the rows alone."""
    for before, after in pairwise([0, *(message.seq for message in stored.messages)]):
        if after != before + 1:
            yield Problem("GAP" if after > before else "DOUBLED", f"seq {after} follows {before}")
    for id_, times in Counter(message.id for message in stored.messages).items():
        if times > 1:
            yield Problem("DOUBLED", f"{id_} is stored {times} times")
    for earlier, later in pairwise(stored.messages):
        if earlier.created_us > later.created_us:
            yield Problem("ORDER", f"seq {later.seq} is older than seq {earlier.seq}")
    for message in stored.messages:
        if not message.is_deleted and not message.content.startswith(message.id):
            yield Problem("MOVED", f"{message.id} has other content")


def _counts(stored: History) -> Iterator[Problem]:
    """Compare what the session says of its messages with them."""
    last = stored.messages[-1].seq if stored.messages else 0
    if stored.last_seq != last:
        yield Problem("GAP", f"last_seq is {stored.last_seq}, and the last message's {last}")
    if stored.message_count != (
        count := sum(not message.is_deleted for message in stored.messages)
    ):
        yield Problem("MOVED", f"message_count is {stored.message_count}, and there are {count}")


def _places(record: Record, stored: History) -> Iterator[Problem]:
    """Compare what was sent and acknowledged with the rows."""
    places = {message.id: (message.seq, message.created_us) for message in stored.messages}
    for sent in record.sent:
        for _, answer in sent.answers:
            for id_, told in answer.items():
                if told == NOWHERE:
                    yield Problem("LOST", f"an answer to {id_} does not name it")
                elif id_ not in places:
                    yield Problem("LOST", f"{id_} was acknowledged at {told[0]}")
                elif places[id_] != told:
                    yield Problem("MOVED", f"{id_} was acknowledged as {told} and is {places[id_]}")
        there = [places[id_][0] for id_ in sent.ids if id_ in places]
        if there and there != list(range(there[0], there[0] + len(sent.ids))):
            yield Problem(
                "TORN",
                f"the messages of one request are at {there}, and there were {len(sent.ids)}",
            )
    strange = places.keys() - {id_ for sent in record.sent for id_ in sent.ids}
    if strange:
        yield Problem("STRANGE", f"nobody sent {sorted(strange)}")


def _erased(record: Record, stored: History) -> Iterator[Problem]:
    """Compare what was to be erased with what is."""
    erasures = {erasure.id: erasure for erasure in record.erasures}
    for message in stored.messages:
        erasure = erasures.get(message.id)
        if message.is_deleted and erasure is None:
            yield Problem("LOST", f"{message.id} is erased, and nobody asked for that")
        if not message.is_deleted and erasure is not None and erasure.acknowledged < math.inf:
            yield Problem("MOVED", f"{message.id} was erased and is there")


def _edited(record: Record, stored: History) -> Iterator[Problem]:
    """Look for changes that were acknowledged and are not there, though none that was under way then or later explains that."""
    values = {
        message.id: message.content for message in stored.messages if not message.is_deleted
    } | {"": stored.title}
    by_id: dict[str, list[Edit]] = {}
    for edit in record.edits:
        by_id.setdefault(edit.id, []).append(edit)
    for id_ in by_id.keys() & values.keys():
        edits, what = by_id[id_], id_ or "the title"
        known = max(
            (edit.begun for edit in edits if edit.acknowledged < math.inf), default=-math.inf
        )
        there = [edit for edit in edits if edit.value == values[id_]]
        if not there and known > -math.inf:
            yield Problem("LOST", f"a change of {what} was acknowledged, and none is there")
        elif there and all(edit.acknowledged < known for edit in there):
            yield Problem(
                "LOST", f"a change of {what} was acknowledged, and an earlier one is there"
            )


def _order(record: Record, stored: History) -> Iterator[Problem]:
    """Look for an append that was acknowledged before another began, and lies behind it."""
    places = {message.id: message.seq for message in stored.messages}
    there = sorted(
        (sent for sent in record.sent if sent.ids[0] in places),
        key=lambda sent: places[sent.ids[0]],
    )
    done = math.inf
    for sent in reversed(there):
        if done < sent.begun:
            yield Problem("ORDER", f"{sent.ids[0]} began after a later one was acknowledged")
        done = min(done, sent.acknowledged)


def _views(record: Record, stored: History) -> Iterator[Problem]:
    """Compare what readers were shown with the rows, and with what had been acknowledged when they asked."""
    ids = {message.seq: message.id for message in stored.messages}
    erasures = {erasure.id: erasure for erasure in record.erasures}
    done = sorted(
        (at, max(places.values())[0]) for sent in record.sent for at, places in sent.answers
    )
    known = at = 0
    for view in sorted(record.views):
        while at < len(done) and done[at][0] < view.begun:
            known = max(known, done[at][1])
            at += 1
        if view.last_seq is not None and not known <= view.last_seq <= stored.last_seq:
            words = f"last_seq was {view.last_seq}, {known} was acknowledged, and {stored.last_seq} is there"
            yield Problem("STALE" if view.last_seq < known else "VIEW", words)
        yield from _shown(view, ids, erasures, known)


def _shown(
    view: View, ids: dict[int, str], erasures: dict[str, Erasure], known: int
) -> Iterator[Problem]:
    """Compare one view with the rows; `known` is the last seq that was acknowledged before it began."""
    last = view.after
    for seq, id_ in view.shown:
        if ids.get(seq) != id_:
            yield Problem("VIEW", f"seq {seq} was shown as {id_}, and {ids.get(seq)} is stored")
        elif seq <= last:
            yield Problem("VIEW", f"seq {seq} was shown behind {last}")
        elif id_ in erasures and erasures[id_].acknowledged < view.begun:
            yield Problem("STALE", f"{id_} was shown after it was erased")
        last = max(last, seq)
    if view.to_end:
        last = max(last, known)
    shown = {seq for seq, _ in view.shown}
    for seq in range(view.after + 1, last + 1):
        if seq not in shown and not (
            ids.get(seq) in erasures and erasures[ids[seq]].begun < view.ended
        ):
            yield Problem("STALE" if seq <= known else "VIEW", f"seq {seq} was not shown")
