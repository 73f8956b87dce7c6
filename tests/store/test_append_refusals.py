"""Statements of appends that fail every time: each caller receives the final error, without a loop.

The bounds count statements, not time: a loop without a pause sends thousands until the deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg
import pytest

from service.errors import Conflict, InvalidArgument, Unavailable
from service.store.append import sql
from service.store.append.appender import Appender
from service.store.append.lane import MAX_LOST_RACES
from service.store.append.request import Append, Appended, NewMessage
from service.store.db import retries
from service.store.db.database import Database
from service.store.db.dsn import parse
from service.store.db.retries import MAX_CANCELLED_ATTEMPTS
from tests.support.appends import new_message, new_user
from tests.support.chat import new_id
from tests.support.sqlstates import error_of

ITEMS_PER_SESSION = 4
SESSIONS = 2
ITEMS = ITEMS_PER_SESSION * SESSIONS


class Faulty(Database):
    """A database that fails one kind of statement of appends with a SQLSTATE, and counts all."""

    code: str | None = None
    fails_look_ups = True
    faulty_session = ""
    """Only statements that concern this session fail; empty: all of them."""
    look_ups = 0
    others = 0

    async def fetch_once(self, statement: Any, *args: Any, **options: Any) -> Any:
        is_look_up = statement.text == sql.statements(enqueues=False).look_up.text
        self.look_ups += is_look_up
        self.others += not is_look_up
        if self.code is not None and is_look_up == self.fails_look_ups:
            session_ids = args[1]
            if not self.faulty_session or self.faulty_session in session_ids:
                await asyncio.sleep(0)
                raise error_of(self.code)
        return await super().fetch_once(statement, *args, **options)

    @property
    def sent(self) -> int:
        """The number of statements."""
        return self.look_ups + self.others


class Appends:
    """Appends to some sessions, through one lane."""

    def __init__(self, database: Faulty, user_id: str) -> None:
        self.database = database
        self.session_ids = [new_id() for _ in range(SESSIONS)]
        self._user_id = user_id
        self._appender = Appender(database, lanes=1)
        self._messages = self._new_messages()

    def _new_messages(self) -> list[tuple[str, NewMessage]]:
        return [
            (session_id, new_message(new_id()))
            for session_id in self.session_ids
            for _ in range(ITEMS_PER_SESSION)
        ]

    def fail_look_ups(self, code: str, session_id: str = "") -> None:
        """Make look-ups fail. The appends are retries of stored ones, which are looked up."""
        self._fail(code, look_ups=True, session_id=session_id)

    def fail_statements(self, code: str, session_id: str = "") -> None:
        """Make the statement that stores messages fail, for new messages."""
        self._messages = self._new_messages()
        self._fail(code, look_ups=False, session_id=session_id)

    def _fail(self, code: str, *, look_ups: bool, session_id: str) -> None:
        database = self.database
        database.code, database.fails_look_ups = code, look_ups
        database.faulty_session = session_id
        database.look_ups = database.others = 0

    async def send(self, seconds: float = 30.0) -> list[Appended | BaseException]:
        """Send all appends concurrently, and return their answers."""
        tasks = [
            asyncio.create_task(self._append(session_id, message, seconds))
            for session_id, message in self._messages
        ]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await self._appender.drain()
        assert self._appender.queued_count == 0
        return answers

    async def _append(self, session_id: str, message: NewMessage, seconds: float) -> Appended:
        deadline = asyncio.get_running_loop().time() + seconds
        item = Append(self._user_id, session_id, [message], deadline, may_create=True)
        return await self._appender.append(item)


@pytest.fixture
async def appends(database_url: str) -> AsyncGenerator[Appends]:
    """Provide appends that are stored already."""
    database = Faulty(parse(database_url))
    appends = Appends(database, await new_user(database_url))
    assert types(await appends.send()) == {Appended}
    yield appends
    await database.close()


def types(answers: list[Appended | BaseException]) -> set[type]:
    return {type(answer) for answer in answers}


FINAL_ERRORS: dict[str, type[Exception]] = {
    "42501": Unavailable,
    "42P01": Unavailable,
    "57014": Unavailable,
    "P0001": Unavailable,
    "XX001": Unavailable,
    "58030": Unavailable,
    "22P02": InvalidArgument,
    "40001": Conflict,
    "XX000": asyncpg.InternalServerError,
    "0A000": asyncpg.FeatureNotSupportedError,
}
# An item is in a shared statement, in one of its session, and in one of its own, each of them after
# a look-up.
MAX_STATEMENTS = 6 * ITEMS
MAX_REPETITIONS = {"57014": MAX_CANCELLED_ATTEMPTS, "40001": MAX_LOST_RACES}


@pytest.mark.parametrize("code", FINAL_ERRORS)
async def test_look_up_that_always_fails_is_answered_with_its_error(
    appends: Appends, code: str
) -> None:
    appends.fail_look_ups(code)
    answers = await appends.send()
    assert types(answers) == {FINAL_ERRORS[code]}
    assert appends.database.look_ups >= 1
    assert appends.database.sent <= MAX_STATEMENTS * MAX_REPETITIONS.get(code, 1)


@pytest.mark.parametrize("code", FINAL_ERRORS)
async def test_statement_that_always_fails_is_answered_with_its_error(
    appends: Appends, code: str
) -> None:
    appends.fail_statements(code)
    answers = await appends.send()
    assert types(answers) == {FINAL_ERRORS[code]}
    assert appends.database.sent <= MAX_STATEMENTS * MAX_REPETITIONS.get(code, 1)


@pytest.mark.parametrize("code", ["42501", "42P01"])
async def test_error_that_concerns_all_items_is_answered_without_further_statements(
    appends: Appends, code: str
) -> None:
    """An append that arrives alone is sent alone; those that arrive during it share the next."""
    appends.fail_statements(code)
    assert types(await appends.send()) == {Unavailable}
    assert appends.database.sent <= 2


@pytest.mark.parametrize("code", ["25006", "53100", "57P01", "28P01", "26000"])
@pytest.mark.parametrize("is_look_up", [True, False], ids=["look-up", "statement"])
async def test_appends_wait_for_an_outage_with_back_off(
    appends: Appends, monkeypatch: pytest.MonkeyPatch, code: str, is_look_up: bool
) -> None:
    # A long margin before the deadline, because a busy machine may be late.
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 1.0)
    (appends.fail_look_ups if is_look_up else appends.fail_statements)(code)
    answers = await appends.send(seconds=4.0)
    assert types(answers) == {Unavailable}
    # About a dozen rounds of a look-up and a statement.
    assert 3 <= appends.database.sent < 200
    appends.database.code = None
    assert types(await appends.send()) == {Appended}


@pytest.mark.parametrize("code", ["XX001", "P0001", "XX000"])
@pytest.mark.parametrize("is_look_up", [True, False], ids=["look-up", "statement"])
async def test_error_of_one_session_does_not_fail_the_appends_to_another(
    appends: Appends, code: str, is_look_up: bool
) -> None:
    """A damaged page, or a trigger of the operator's own, concerns some rows only."""
    fail = appends.fail_look_ups if is_look_up else appends.fail_statements
    fail(code, appends.session_ids[0])
    answers = await appends.send()
    assert types(answers[:ITEMS_PER_SESSION]) == {FINAL_ERRORS[code]}
    assert types(answers[ITEMS_PER_SESSION:]) == {Appended}


@pytest.mark.parametrize("is_look_up", [True, False], ids=["look-up", "statement"])
async def test_statement_that_is_cancelled_once_is_repeated(
    appends: Appends, monkeypatch: pytest.MonkeyPatch, is_look_up: bool
) -> None:
    (appends.fail_look_ups if is_look_up else appends.fail_statements)("57014")
    database = appends.database
    fetch_once = database.fetch_once
    failures = 0

    async def recovers(statement: Any, *args: Any) -> Any:
        nonlocal failures
        try:
            return await fetch_once(statement, *args)
        except asyncpg.QueryCanceledError:
            failures += 1
            database.code = None
            raise

    monkeypatch.setattr(database, "fetch_once", recovers)
    assert types(await appends.send()) == {Appended}
    assert failures == 1


async def test_driver_timeout_of_an_append_leaves_its_outcome_unknown(
    appends: Appends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement was committed, and its reply did not arrive in time: this is no replay."""
    appends.fail_statements("XX000")
    database = appends.database
    database.code = None
    fetch_once = database.fetch_once

    async def stores_and_times_out(statement: Any, *args: Any) -> Any:
        monkeypatch.undo()
        await fetch_once(statement, *args)
        raise TimeoutError

    monkeypatch.setattr(database, "fetch_once", stores_and_times_out)
    answers = await appends.send()
    assert types(answers) == {Appended}
    replayed = [entry.replayed for answer in answers for entry in answer.entries]  # type: ignore[union-attr]
    assert replayed == [False] * ITEMS
