"""Concurrent appends on two stores, a sequential model of them, and the search for their order.

A *burst* starts many operations in one turn of the event loop, so that they share statements and
collide. Afterwards `explain` looks for an order of them in which the model gives all the answers
and the current tables. An operation that ended before another began must come first.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ServiceError,
    Unavailable,
)
from service.store import messages, sessions
from service.store.append.appender import Appender
from service.store.append.request import Append, NewMessage, NewSession
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.tables import SessionState
from tests.support.chat import new_id
from tests.support.cluster import fetch, wait_until_idle
from tests.support.history import History, read_history

NAMES = 6
"""Message ids of a session; few, so that appends collide."""

# --- Operations, and their sequential model.


class Word(NamedTuple):
    """A message: the number of its id in the session, and which of two contents it has."""

    name: int
    variant: int


@dataclass(frozen=True)
class Add:
    """An append."""

    words: tuple[Word, ...]
    expected: int | None = None
    may_create: bool = False
    has_derived_id: bool = False
    """Whether the request named no session, so that a tombstone refuses it."""
    cancel_after: int | None = None
    """Turns of the event loop after which the caller is cancelled."""


@dataclass(frozen=True)
class EraseSession:
    """Delete the session with its messages, which leaves a tombstone."""


@dataclass(frozen=True)
class EraseMessage:
    """Delete a message, which leaves a tombstone."""

    name: int


@dataclass(frozen=True)
class SetState:
    """Archive the session, or reactivate it."""

    state: SessionState


Operation = Add | EraseSession | EraseMessage | SetState


class Content(NamedTuple):
    """A session in the model; one that never existed is None."""

    state: SessionState = SessionState.ACTIVE
    words: tuple[Word, ...] = ()
    """In order of seq."""
    erased: frozenset[int] = frozenset()
    """Names of the tombstones of messages."""
    is_missing: bool = False
    """Whether it was deleted, and not created again."""
    has_tombstone: bool = False
    """Whether it was deleted once."""


ERASED = Content(is_missing=True, has_tombstone=True)


Answer = tuple[Any, ...]
CANCELLED: Answer = ("unknown",)
CONTENTION: Answer = ("contention",)


def run(content: Content | None, operation: Operation) -> tuple[Content | None, Answer]:
    """Apply one operation to the model."""
    is_missing = content is None or content.is_missing
    match operation:
        case Add():
            return _add(content, operation)
        case EraseSession():
            return content if is_missing else ERASED, ("erased", not is_missing)
        case _ if content is None or content.is_missing:
            return content, ("no session",)
        case EraseMessage(name):
            there = any(word.name == name for word in content.words) and name not in content.erased
            return content._replace(erased=content.erased | {name}) if there else content, (
                "erased",
                there,
            )
        case SetState(state):
            return content._replace(state=state), ("state",)


def _add(content: Content | None, add: Add) -> tuple[Content | None, Answer]:
    now = content or Content(is_missing=True)
    created = now.is_missing
    if now.is_missing and not (add.may_create or add.has_derived_id):
        return content, ("no session",)
    seqs_by_name = {word.name: (seq, word.variant) for seq, word in enumerate(now.words, 1)}
    for word in add.words:
        if word.name in seqs_by_name and seqs_by_name[word.name][1] != word.variant:
            return content, ("reused", word.name)
    fresh = tuple(word for word in add.words if word.name not in seqs_by_name)
    if fresh and add.has_derived_id and now.has_tombstone:
        return content, ("no session",)
    if fresh and now.state is SessionState.ARCHIVED:
        return content, ("archived",)
    if fresh and add.expected not in (None, len(now.words)):
        return content, ("mismatch", len(now.words))
    after = now._replace(words=now.words + fresh, is_missing=False)
    seqs = {word.name: seq for seq, word in enumerate(after.words, 1)}
    return after, (
        "added",
        created,
        tuple((seqs[word.name], word.name in seqs_by_name) for word in add.words),
    )


# --- The search for an order.


@dataclass
class Done:
    """An operation with its answer, and the times of its begin and end."""

    operation: Operation
    answer: Answer
    began: float
    ended: float


def explain(
    start: Content | None, end: Content | None, done: Sequence[Done], *, flags: bool = True
) -> bool:
    """Whether some order gives these answers and this end; without `flags`, seqs alone count."""
    # A contended operation changed nothing. One with an unknown outcome may have been applied.
    done = [operation for operation in done if operation.answer != CONTENTION]
    dead: set[tuple[int, Content | None]] = set()

    def search(left: int, content: Content | None) -> bool:
        waiting = [n for n in range(len(done)) if left >> n & 1]
        if content == end and all(done[n].answer == CANCELLED for n in waiting):
            return True
        if (left, content) in dead:
            return False
        first_end = min(done[n].ended for n in waiting) if waiting else math.inf
        for n in waiting:
            if done[n].began > first_end:
                continue
            after, answer = run(content, done[n].operation)
            fits = done[n].answer == CANCELLED or _plain(answer, flags) == _plain(
                done[n].answer, flags
            )
            if fits and search(left & ~(1 << n), after):
                return True
        dead.add((left, content))
        return False

    return search((1 << len(done)) - 1, start)


def _plain(answer: Answer, flags: bool) -> Answer:
    if flags or answer[0] != "added":
        return answer
    return ("added", tuple(seq for seq, _ in answer[2]))


# --- The service.


@dataclass
class World:
    """Two stores on one database, and one user's sessions."""

    url: str
    databases: list[Database]
    user_id: str
    session_ids: list[str] = field(default_factory=lambda: [_derived_id(), _derived_id()])
    lanes: int = 2
    search_enabled: bool = False
    """Whether appends are enqueued for the search index, by another statement."""

    def __post_init__(self) -> None:
        self.appenders = [
            Appender(database, self.lanes, search_enabled=self.search_enabled)
            for database in self.databases
        ]
        self._clock = itertools.count()
        self._ids = [[new_id() for _ in range(NAMES)] for _ in self.session_ids]

    def message_id(self, session: int, name: int) -> str:
        return self._ids[session][name]

    async def content(self, session: int) -> tuple[History | None, Content | None]:
        """Read a session from the tables, check its invariants, and return it as in the model."""
        session_id = self.session_ids[session]
        history = await read_history(self.url, self.user_id, session_id)
        tombstones = await fetch(
            self.url,
            "SELECT FROM session_tombstones WHERE user_id = $1 AND session_id = $2"
            " AND deleted_at > '-infinity'",
            self.user_id,
            session_id,
        )
        if history is None:
            return None, ERASED if tombstones else None
        history.check()
        names = {self.message_id(session, name): name for name in range(NAMES)}
        words = tuple(Word(names[m.id], _variant(m.fingerprint)) for m in history.messages)
        erased = frozenset(names[m.id] for m in history.messages if m.is_deleted)
        return history, Content(
            SessionState(history.state), words, erased, has_tombstone=bool(tombstones)
        )

    async def perform(self, store: int, session: int, delay: int, operation: Operation) -> Done:
        """Run an operation and record its answer."""
        for _ in range(delay):
            await asyncio.sleep(0)
        began = next(self._clock)
        try:
            answer = await self._answer(store, session, operation)
        except asyncio.CancelledError:
            return Done(operation, CANCELLED, began, math.inf)
        return Done(operation, answer, began, next(self._clock))

    async def _answer(self, store: int, session: int, operation: Operation) -> Answer:
        database, session_id = self.databases[store], self.session_ids[session]
        deadline = asyncio.get_running_loop().time() + 30
        try:
            match operation:
                case Add():
                    return await self._append(store, session, operation, deadline)
                case EraseSession():
                    return "erased", await database.write(
                        lambda connection: sessions.delete(connection, self.user_id, session_id),
                        owner_id=self.user_id,
                        deadline=deadline,
                    )
                case EraseMessage(name):
                    message_id = self.message_id(session, name)
                    is_deleted = await database.write(
                        lambda connection: messages.delete(
                            connection, self.user_id, session_id, message_id
                        ),
                        owner_id=self.user_id,
                        deadline=deadline,
                    )
                    return "erased", is_deleted
                case SetState(state):
                    await database.write(
                        lambda connection: sessions.update(
                            connection, self.user_id, session_id, {"state": state}, ""
                        ),
                        owner_id=self.user_id,
                        deadline=deadline,
                    )
                    return ("state",)
        except ServiceError as error:
            return self._refusal(session, error)

    async def _append(self, store: int, session: int, add: Add, deadline: float) -> Answer:
        new = [new_message(self.message_id(session, word.name), word.variant) for word in add.words]
        item = Append(
            self.user_id,
            self.session_ids[session],
            new,
            deadline,
            may_create=add.may_create or add.has_derived_id,
            has_derived_id=add.has_derived_id,
            expected_last_seq=add.expected,
            new_session=NewSession(fingerprint=b"x"),
        )
        call = asyncio.ensure_future(self.appenders[store].append(item))
        if add.cancel_after is not None:
            for _ in range(add.cancel_after):
                await asyncio.sleep(0)
            call.cancel()
        stored = await call
        assert [entry.id for entry in stored.entries] == [message.id for message in new]
        return (
            "added",
            stored.session_created,
            tuple((entry.seq, entry.replayed) for entry in stored.entries),
        )

    def _refusal(self, session: int, error: ServiceError) -> Answer:
        match error:
            case NotFound(reason="SESSION_NOT_FOUND"):
                return ("no session",)
            case AlreadyExists(reason="MESSAGE_ID_REUSED"):
                return "reused", self._ids[session].index(error.metadata["message_id"])
            case FailedPrecondition(reason="SESSION_ARCHIVED"):
                return ("archived",)
            case Conflict(reason="LAST_SEQ_MISMATCH"):
                return "mismatch", int(error.metadata["last_seq"])
            case Conflict(reason="CONTENTION"):
                return CONTENTION
            case Unavailable() | DeadlineExceeded():
                return CANCELLED
        raise error


def _derived_id() -> str:
    """Return an id of the kind that is derived for a session: only these leave a tombstone."""
    return str(uuid.uuid5(uuid.uuid4(), ""))


def new_message(message_id: str, variant: int = 0) -> NewMessage:
    """Return a message; variants differ in their content."""
    content = f"content {variant}"
    return NewMessage(
        message_id,
        1,
        content,
        None,
        None,
        None,
        1,
        len(content),
        "",
        None,
        None,
        _fingerprint(variant),
    )


def _fingerprint(variant: int) -> bytes:
    return hashlib.blake2b(str(variant).encode(), digest_size=16).digest()


def _variant(fingerprint: bytes) -> int:
    return [_fingerprint(0), _fingerprint(1)].index(fingerprint)


class Step(NamedTuple):
    """One operation, its store, its session, and its delay in turns of the event loop."""

    store: int
    session: int
    delay: int
    operation: Operation


async def play(
    world: World,
    bursts: Iterable[list[Step]],
    *,
    flags: bool = True,
    prepare: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run bursts one after the other and explain each; `prepare` is awaited before each."""
    before: list[Content | None] = [None for _ in world.session_ids]
    for burst in bursts:
        if prepare is not None:
            await prepare()
        done = await asyncio.gather(*(world.perform(*step) for step in burst))
        for appender in world.appenders:
            await appender.drain()
            assert appender.queued_count == 0
        for database in world.databases:
            await database.writes_in_flight.drain()
        # A statement whose connection was closed may still run.
        await wait_until_idle(world.url)
        for session, start in enumerate(before):
            mine = [
                operation
                for step, operation in zip(burst, done, strict=True)
                if step.session == session
            ]
            history, before[session] = await world.content(session)
            if not explain(start, before[session], mine, flags=flags):
                lines = [f"from {start}", *map(str, mine), f"to {before[session]}: {history}"]
                raise AssertionError("no order explains\n" + "\n".join(lines))


async def new_user(url: str) -> str:
    """Insert a user and return its id."""
    user_id = new_id()
    await fetch(url, "INSERT INTO users (id, fingerprint) VALUES ($1, '')", user_id)
    return user_id


@asynccontextmanager
async def stores(*urls: str, **options: Any) -> AsyncGenerator[list[Database]]:
    """Open a store on each of these URLs."""
    async with AsyncExitStack() as stack:
        databases = []
        for url in urls:
            database = Database(parse(url), **options)
            stack.push_async_callback(database.close)
            databases.append(database)
        yield databases
