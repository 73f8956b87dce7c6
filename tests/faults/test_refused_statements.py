"""Statements that PostgreSQL refuses or ends: what callers and operators receive, and how often.

The numbers of statements are bounded: a loop without a pause would send thousands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from grpc import StatusCode, aio
from structlog.testing import capture_logs

from service import doctor
from service.store.db import retries
from service.store.db.dsn import parse
from tests.faults.conftest import calls_by_route
from tests.support import commit_faults, failures
from tests.support.chat import Chat, new_messages
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.history import read_valid_history
from tests.support.servers import connected, serving
from tests.support.statements import SentStatements, database_name

UNAVAILABLE = "DATABASE_UNAVAILABLE"
RETRIES = 8
MAX_STATEMENTS = 60
"""Statements of eight appends, each of which is looked up and repeated, and of some probes."""
MAX_STATEMENTS_OF_AN_OUTAGE = 200
"""Those of one append that waits for seconds with back-off, with new connections and probes."""


@pytest.fixture
async def role_url(cluster: Cluster, database_url: str) -> AsyncGenerator[str]:
    """Provide the connection string of a role with the documented privileges."""
    admin = cluster.url("postgres")
    await fetch(admin, "DROP ROLE IF EXISTS chat")
    await fetch(admin, "CREATE ROLE chat LOGIN")
    await fetch(database_url, "GRANT USAGE ON SCHEMA chathistory TO chat")
    await fetch(
        database_url,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chathistory TO chat",
    )
    url = database_url.replace("postgres@", "chat@", 1)
    assert url != database_url
    yield url
    await fetch(database_url, "DROP OWNED BY chat")
    await fetch(admin, "DROP ROLE chat")


async def failures_of(calls: list[Awaitable[object]]) -> list[failures.Failure]:
    """Return the failures of calls that must all fail."""
    return list(await asyncio.gather(*map(failures.failure_of, calls)))


def causes(events: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the causes in the log by SQLSTATE."""
    causes: dict[str, list[str]] = {}
    for event in events:
        if event["event"] == "database error":
            assert event["log_level"] == "warning"
            causes.setdefault(event["sqlstate"], []).append(event["cause"])
    return causes


# --- Privileges and the schema.


FAULTS = {
    "look-up denied": "REVOKE SELECT ON chat_messages FROM chat",
    "insert denied": "REVOKE INSERT ON chat_messages FROM chat",
    "everything denied": "REVOKE ALL ON ALL TABLES IN SCHEMA chathistory FROM chat",
    "column renamed": "ALTER TABLE chat_messages RENAME COLUMN fingerprint TO other",
    "table renamed": "ALTER TABLE chat_messages RENAME TO other",
}


@pytest.mark.case(n=524)
@pytest.mark.parametrize("fault", FAULTS)
async def test_refused_append_is_answered_immediately_and_is_not_repeated(
    cluster: Cluster, database_url: str, role_url: str, fault: str
) -> None:
    """Eight retries of one session wait, which must all be looked up."""
    async with serving(role_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        requests = [
            message_pb2.AppendMessagesRequest(
                user_id=chat.user_id, session_id=session_id, messages=new_messages(1)
            )
            for _ in range(RETRIES)
        ]
        await asyncio.gather(*(stub.AppendMessages(request) for request in requests))
        await fetch(database_url, FAULTS[fault])
        sent = SentStatements(cluster, database_url)
        with capture_logs() as events:
            calls: list[Awaitable[object]] = [
                stub.AppendMessages(request, timeout=30) for request in requests
            ]
            refused = await failures_of(calls)
        assert {(failure.code, failure.reason) for failure in refused} == {
            (StatusCode.UNAVAILABLE, UNAVAILABLE)
        }
        assert all(failure.retry_after for failure in refused)
        assert len(sent.so_far()) < MAX_STATEMENTS
        ((state, messages),) = causes(events).items()
        assert state == (
            "42501" if "denied" in fault else "42703" if "column" in fault else "42P01"
        )
        assert len(messages) == 1, "one line a minute for each SQLSTATE"
        assert "grant" in messages[0] or "chat-history migrate" in messages[0]


async def test_calls_on_every_route_are_refused_while_a_privilege_is_missing(
    database_url: str, role_url: str
) -> None:
    """They succeed again after it is granted, without a restart."""
    async with serving(role_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        calls = calls_by_route(chat, session_id)
        await asyncio.gather(*(call() for call in calls.values()))
        await fetch(database_url, "REVOKE ALL ON ALL TABLES IN SCHEMA chathistory FROM chat")
        for call in calls.values():
            await failures.assert_fails(call(), UNAVAILABLE)
        await fetch(
            database_url,
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA chathistory TO chat",
        )
        await asyncio.gather(*(call() for call in calls.values()))
        (await read_valid_history(database_url, chat.user_id, session_id)).check()


async def test_error_of_a_trigger_of_the_operator_concerns_one_append_only(
    chat: Chat, database_url: str
) -> None:
    """Appends that share a statement with the one that the trigger refuses are stored."""
    await commit_faults.install(database_url)
    session_id = await chat.start()
    await commit_faults.arm(database_url, "P0001", 1000, content="refused%")
    answers = await asyncio.gather(
        *(chat.append(session_id, f"{('kept', 'refused')[n == 3]} {n}") for n in range(8)),
        return_exceptions=True,
    )
    refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
    assert [failures.read_failure(error).reason for error in refused] == [UNAVAILABLE]
    assert isinstance(answers[3], aio.AioRpcError)
    assert (await chat.get_session(session_id)).last_seq == 1 + 7


# --- Timeouts of the server.


TIMEOUTS = {"statement_timeout": "57014", "transaction_timeout": "25P04"}


@asynccontextmanager
async def slow_inserts(database_url: str) -> AsyncGenerator[None]:
    """Make each insert of a message take seconds during the block."""
    await fetch(
        database_url,
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(5); RETURN NULL; END $$",
    )
    await fetch(
        database_url,
        "CREATE TRIGGER wait AFTER INSERT ON chat_messages "
        "FOR EACH STATEMENT EXECUTE FUNCTION wait()",
    )
    yield
    await fetch(database_url, "DROP TRIGGER wait ON chat_messages")


@pytest.mark.case(n=507)
@pytest.mark.parametrize("name", TIMEOUTS)
async def test_append_that_a_timeout_of_the_server_ends_is_unavailable_and_the_setting_is_named(
    cluster: Cluster, database_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with connected_to(database_url) as connection:
        if await connection.fetchval("SELECT current_setting($1, true)", name) is None:
            pytest.skip(f"this PostgreSQL has no {name}")
    # The statement in flight ends after the call's last attempt should have begun.
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 2.0)
    admin, database = cluster.url("postgres"), database_name(database_url)
    await fetch(admin, f"ALTER DATABASE {database} SET {name} = '500ms'")
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        request = message_pb2.AppendMessagesRequest(
            user_id=chat.user_id, session_id=session_id, messages=new_messages(1)
        )
        sent = SentStatements(cluster, database_url)
        async with slow_inserts(database_url):
            with capture_logs() as events:
                failure = await failures.failure_of(stub.AppendMessages(request, timeout=8))
        assert (failure.code, failure.reason) == (StatusCode.UNAVAILABLE, UNAVAILABLE)
        assert failure.retry_after
        assert len(sent.so_far()) < MAX_STATEMENTS_OF_AN_OUTAGE
        [cause] = causes(events)[TIMEOUTS[name]]
        assert name in cause
        reply = await stub.AppendMessages(request)
        assert [(entry.seq, entry.replayed) for entry in reply.messages] == [(2, False)]


async def test_statement_that_is_cancelled_once_is_repeated_on_every_route(
    chat: Chat, database_url: str
) -> None:
    session_id = await chat.start()
    await commit_faults.install(database_url)
    await commit_faults.arm(database_url, "57014", 2)
    reply = await chat.append(session_id, "stored once")
    assert [(entry.seq, entry.replayed) for entry in reply.messages] == [(2, False)]
    await commit_faults.install(database_url, "chat_sessions", "INSERT OR UPDATE")
    await commit_faults.arm(database_url, "57014", 2)
    updated = await chat.update_session(["title"], id=session_id, title="new")
    assert updated.title == "new"
    await commit_faults.arm(database_url, "57014", 1000)
    for call in (
        chat.append(session_id, "never"),
        chat.update_session(["title"], id=session_id, title="never"),
    ):
        await failures.assert_fails(call, UNAVAILABLE)
    await commit_faults.arm(database_url, "57014", 0)
    assert (await chat.append(session_id, "after")).messages[0].seq == 3


@pytest.mark.case(n=507)
@pytest.mark.parametrize("name", ["statement_timeout", "idle_in_transaction_session_timeout"])
async def test_check_names_a_timeout_of_the_server_that_ends_statements(
    cluster: Cluster, database_url: str, name: str
) -> None:
    admin, database = cluster.url("postgres"), database_name(database_url)
    target, pool = parse(database_url), doctor.Pool(8, 4, 240, 12)
    for value, expected in (("4999ms", doctor.Verdict.TODO), ("5s", None), ("0", None)):
        await fetch(admin, f"ALTER DATABASE {database} SET {name} = '{value}'")
        findings = doctor.diagnose(await doctor.describe(target, 5.0), target, pool)
        verdicts = {finding.subject: finding.verdict for finding in findings}
        assert verdicts.get(name) is expected, value
