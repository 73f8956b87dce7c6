"""Records the calls of clients on a session and their replies, and judges them by the stored rows.

Any number of clients write to a record while a test runs, on one clock. When no call is in flight
any more, `judge` compares it with the stored rows. It checks the service's guarantees:

- Every acknowledged message is stored once, with the seq and time of its acknowledgement, also if
  it was acknowledged twice.
- A request that was not acknowledged is stored completely, with adjacent messages, or not at all.
  Nothing else is stored.
- `seq` is 1, 2, 3… without a gap. An append that was acknowledged before another began has the
  lower seqs.
- An acknowledged change is stored, unless it was replaced by one that may have come later.
- Every view agrees with the stored rows, contains all that was acknowledged before it began, and
  nothing that had been deleted.

The content of a message begins with its id (`new_marked_message`), which reveals exchanged
contents.
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

SeenMessage = tuple[int, str]
"""The seq and id of a message, as a reader received them."""
MISSING = (0, 0)
"""The seq and time of a message that a reply left out."""


class Problem(NamedTuple):
    """A violated guarantee."""

    kind: str
    """LOST, DOUBLED, GAP, MOVED, TORN, STRANGE, ORDER, VIEW or STALE."""
    words: str


@dataclass(slots=True)
class Sent:
    """An append of new messages, with all its retries."""

    ids: tuple[str, ...]
    begun: float = field(default_factory=time.monotonic)
    answers: list[tuple[float, dict[str, tuple[int, int]]]] = field(default_factory=list)
    """For each reply, its time, and by id the seq and time (µs since 1970) of each message."""

    @property
    def acknowledged(self) -> float:
        """When it was first acknowledged."""
        return self.answers[0][0] if self.answers else math.inf

    def acknowledge(self, reply: message_pb2.AppendMessagesResponse) -> None:
        """Record a reply, but for messages that belong to other requests."""
        locations = {
            entry.id: (entry.seq, entry.create_time.ToMicroseconds()) for entry in reply.messages
        }
        self.answers.append(
            (time.monotonic(), {id_: locations.get(id_, MISSING) for id_ in self.ids})
        )

    @property
    def last_seq(self) -> int:
        """The highest acknowledged seq, or 0."""
        return max(
            (seq for _, locations in self.answers for seq, _ in locations.values()), default=0
        )


@dataclass(slots=True)
class Erasure:
    """A delete of a message."""

    id: str
    begun: float = field(default_factory=time.monotonic)
    acknowledged: float = math.inf


@dataclass(slots=True)
class Edit:
    """A change of a message's content, or of the session's title."""

    id: str
    """The message's id, or empty for the title."""
    value: str
    begun: float = field(default_factory=time.monotonic)
    acknowledged: float = math.inf


class View(NamedTuple):
    """A range of a session as a reader received it, without deleted messages."""

    begun: float
    ended: float
    after: int
    """The range begins after this seq."""
    shown: tuple[SeenMessage, ...]
    to_end: bool
    """Whether it extends to the end of the session."""
    last_seq: int | None = None
    """The session's `last_seq` in the reply, if it had one."""


@dataclass(slots=True)
class Record:
    """The calls on one session."""

    user_id: str
    session_id: str
    sent: list[Sent] = field(default_factory=list)
    erasures: list[Erasure] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    @property
    def name(self) -> dict[str, Any]:
        """The fields of a request that identify the session."""
        return {"user_id": self.user_id, "session_id": self.session_id}

    @property
    def acknowledged(self) -> int:
        """The number of acknowledged messages."""
        return sum(len(sent.ids) for sent in self.sent if sent.answers)

    @property
    def last_seq(self) -> int:
        """The highest acknowledged seq, or 0."""
        return max((sent.last_seq for sent in self.sent), default=0)

    def send(self, messages: Iterable[message_pb2.Message]) -> Sent:
        """Record an append before it is sent."""
        sent = Sent(tuple(message.id for message in messages))
        self.sent.append(sent)
        return sent

    def edit(self, id_: str, value: str) -> Edit:
        """Record a change of a message's content, or of the title (empty id), before it is sent."""
        edit = Edit(id_, value)
        self.edits.append(edit)
        return edit

    def erasing(self, id_: str) -> bool:
        """Whether a client has sent a delete of a message."""
        return any(erasure.id == id_ for erasure in self.erasures)

    def saw_page(self, begun: float, after: int, page: message_pb2.ListMessagesResponse) -> None:
        """Record a page in ascending order."""
        self._saw(begun, after, page.messages, to_end=not page.next_page_token)

    def saw_newest(self, begun: float, page: message_pb2.ListMessagesResponse) -> None:
        """Record the first page in descending order."""
        messages = list(reversed(page.messages))
        after = messages[0].seq - 1 if messages and page.next_page_token else 0
        self._saw(begun, after, messages, to_end=True)

    def saw_context(self, begun: float, context: message_pb2.GetContextResponse) -> None:
        """Record a context of messages without tool calls."""
        after = context.messages[0].seq - 1 if context.messages and context.omitted_count else 0
        self._saw(begun, after, context.messages, to_end=True, session=context.session)

    def saw_session(self, begun: float, session: session_pb2.Session) -> None:
        """Record a session."""
        self._saw(begun, 0, (), to_end=False, session=session)

    def saw_stream(self, begun: float, after: int, messages: Iterable[SeenMessage]) -> None:
        """Record all messages of a watch."""
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
            View(
                begun, time.monotonic(), after, tuple(map(seen_message, messages)), to_end, last_seq
            )
        )


def new_marked_message(
    size: int, role: message_pb2.Role.ValueType = message_pb2.ROLE_USER
) -> message_pb2.Message:
    """Return a message of at least `size` characters, which begin with its id."""
    id_ = new_id()
    return new_message(f"{id_} ".ljust(size, "x"), role, id=id_)


def seen_message(message: message_pb2.Message) -> SeenMessage:
    """Return a message as a view records it."""
    own = message.content.startswith(message.id)
    return (
        message.seq,
        message.id if own else f"{message.id} with other content: {message.content[:36]}",
    )


def judge(record: Record, stored: History | None) -> list[Problem]:
    """Return the guarantees that the stored rows or the views violate."""
    if stored is None:
        return (
            [Problem("LOST", f"session {record.session_id}")]
            if record.acknowledged or record.views
            else []
        )
    looks = (
        _rows(stored),
        _counts(stored),
        _locations(record, stored),
        _erased(record, stored),
        _edited(record, stored),
        _order(record, stored),
        _views(record, stored),
    )
    problems = chain(*looks)
    return [Problem(kind, f"session {record.session_id}: {words}") for kind, words in problems]


def _rows(stored: History) -> Iterator[Problem]:
    """Check the rows alone."""
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
    """Compare the session's counts with its messages."""
    last = stored.messages[-1].seq if stored.messages else 0
    if stored.last_seq != last:
        yield Problem("GAP", f"last_seq is {stored.last_seq}, and the last message's {last}")
    if stored.message_count != (
        count := sum(not message.is_deleted for message in stored.messages)
    ):
        yield Problem("MOVED", f"message_count is {stored.message_count}, and there are {count}")


def _locations(record: Record, stored: History) -> Iterator[Problem]:
    """Compare the appends and their acknowledgements with the rows."""
    locations = {message.id: (message.seq, message.created_us) for message in stored.messages}
    for sent in record.sent:
        for _, answer in sent.answers:
            for id_, acknowledged in answer.items():
                if acknowledged == MISSING:
                    yield Problem("LOST", f"a reply to {id_} does not contain it")
                elif id_ not in locations:
                    yield Problem("LOST", f"{id_} was acknowledged at {acknowledged[0]}")
                elif locations[id_] != acknowledged:
                    yield Problem(
                        "MOVED", f"{id_} was acknowledged as {acknowledged}, is {locations[id_]}"
                    )
        seqs = [locations[id_][0] for id_ in sent.ids if id_ in locations]
        if seqs and seqs != list(range(seqs[0], seqs[0] + len(sent.ids))):
            yield Problem(
                "TORN",
                f"the {len(sent.ids)} messages of one request have the seqs {seqs}",
            )
    strange = locations.keys() - {id_ for sent in record.sent for id_ in sent.ids}
    if strange:
        yield Problem("STRANGE", f"no client sent {sorted(strange)}")


def _erased(record: Record, stored: History) -> Iterator[Problem]:
    """Compare the deletes with the tombstones."""
    erasures = {erasure.id: erasure for erasure in record.erasures}
    for message in stored.messages:
        erasure = erasures.get(message.id)
        if message.is_deleted and erasure is None:
            yield Problem("LOST", f"{message.id} is deleted, but no client deleted it")
        if not message.is_deleted and erasure is not None and erasure.acknowledged < math.inf:
            yield Problem("MOVED", f"{message.id} was deleted and is stored")


def _edited(record: Record, stored: History) -> Iterator[Problem]:
    """Find acknowledged changes that are lost although no later or concurrent one replaced them."""
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
        matching = [edit for edit in edits if edit.value == values[id_]]
        if not matching and known > -math.inf:
            yield Problem("LOST", f"a change of {what} was acknowledged, and none is stored")
        elif matching and all(edit.acknowledged < known for edit in matching):
            yield Problem(
                "LOST", f"a change of {what} was acknowledged, and an earlier one is stored"
            )


def _order(record: Record, stored: History) -> Iterator[Problem]:
    """Find appends that were acknowledged before another began, and have higher seqs."""
    locations = {message.id: message.seq for message in stored.messages}
    stored_appends = sorted(
        (sent for sent in record.sent if sent.ids[0] in locations),
        key=lambda sent: locations[sent.ids[0]],
    )
    done = math.inf
    for sent in reversed(stored_appends):
        if done < sent.begun:
            yield Problem("ORDER", f"{sent.ids[0]} began after a later one was acknowledged")
        done = min(done, sent.acknowledged)


def _views(record: Record, stored: History) -> Iterator[Problem]:
    """Compare the views with the rows, and with the acknowledgements before they began."""
    ids = {message.seq: message.id for message in stored.messages}
    erasures = {erasure.id: erasure for erasure in record.erasures}
    done = sorted(
        (at, max(locations.values())[0]) for sent in record.sent for at, locations in sent.answers
    )
    known = at = 0
    for view in sorted(record.views):
        while at < len(done) and done[at][0] < view.begun:
            known = max(known, done[at][1])
            at += 1
        if view.last_seq is not None and not known <= view.last_seq <= stored.last_seq:
            words = (
                f"last_seq was {view.last_seq}, {known} was acknowledged, "
                f"and {stored.last_seq} is stored"
            )
            yield Problem("STALE" if view.last_seq < known else "VIEW", words)
        yield from _shown(view, ids, erasures, known)


def _shown(
    view: View, ids: dict[int, str], erasures: dict[str, Erasure], known: int
) -> Iterator[Problem]:
    """Compare a view with the rows; `known` is the last seq acknowledged before it began."""
    last = view.after
    for seq, id_ in view.shown:
        if ids.get(seq) != id_:
            yield Problem("VIEW", f"seq {seq} was shown as {id_}, and {ids.get(seq)} is stored")
        elif seq <= last:
            yield Problem("VIEW", f"seq {seq} was shown after {last}")
        elif id_ in erasures and erasures[id_].acknowledged < view.begun:
            yield Problem("STALE", f"{id_} was shown after its delete")
        last = max(last, seq)
    if view.to_end:
        last = max(last, known)
    shown = {seq for seq, _ in view.shown}
    for seq in range(view.after + 1, last + 1):
        if seq not in shown and not (
            ids.get(seq) in erasures and erasures[ids[seq]].begun < view.ended
        ):
            yield Problem("STALE" if seq <= known else "VIEW", f"seq {seq} was not shown")
