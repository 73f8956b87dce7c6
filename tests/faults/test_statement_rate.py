"""Statements during a fault are bounded: nothing is repeated without a pause.

The bound is per second of the fault, so that a slow machine cannot exceed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
from chathistory.v1 import message_pb2, session_pb2

from service.server import Server
from tests.support import commit_faults
from tests.support.chat import Chat, new_messages
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.roles import Role, service_role
from tests.support.servers import connected, serving
from tests.support.statements import SentStatements, database_name

RETRIES = 8
STATEMENTS_PER_CALL = 10
"""Statements of a call that is answered without waiting: three attempts of a transaction."""
STATEMENTS_PER_S = 150
"""Statements of all calls that wait with back-off, and of probes. Without a pause there are
thousands."""
CALL_TIMEOUT_S = 4.0


class Fault(NamedTuple):
    """Something that makes statements or connections fail."""

    causes: tuple[str, ...] = ()
    """Statements of an operator."""
    remedies: tuple[str, ...] = ()
    ends_sessions: bool = False
    """Whether the sessions of the service end after the causes, and after the remedies."""
    state: str | None = None
    """The SQLSTATE with which a trigger fails each append, or `terminate`."""
    locks: str | None = None
    """The table that another transaction locks."""


FAULTS = {
    "read-only": Fault(
        ("ALTER DATABASE {name} SET default_transaction_read_only = on",),
        ("ALTER DATABASE {name} RESET default_transaction_read_only",),
        ends_sessions=True,
    ),
    "look-up denied": Fault(
        ("REVOKE SELECT ON chathistory.chat_messages FROM {role}",),
        ("GRANT SELECT ON chathistory.chat_messages TO {role}",),
    ),
    "insert denied": Fault(
        ("REVOKE INSERT ON chathistory.chat_messages FROM {role}",),
        ("GRANT INSERT ON chathistory.chat_messages TO {role}",),
    ),
    "schema denied": Fault(
        ("REVOKE USAGE ON SCHEMA chathistory FROM {role}",),
        ("GRANT USAGE ON SCHEMA chathistory TO {role}",),
    ),
    "table renamed": Fault(
        ("ALTER TABLE chathistory.chat_messages RENAME TO other",),
        ("ALTER TABLE chathistory.other RENAME TO chat_messages",),
    ),
    "login": Fault(("ALTER ROLE {role} NOLOGIN",), ("ALTER ROLE {role} LOGIN",), True),
    "limit": Fault(
        ("ALTER ROLE {role} CONNECTION LIMIT 0",), ("ALTER ROLE {role} CONNECTION LIMIT -1",), True
    ),
    "statement_timeout": Fault(
        ("ALTER ROLE {role} SET statement_timeout = 1",),
        ("ALTER ROLE {role} RESET statement_timeout",),
        ends_sessions=True,
    ),
    "locked": Fault(locks="chathistory.chat_messages"),
    **{
        state: Fault(state=state)
        for state in (
            *("53100", "53200", "40001", "40P01", "55P03", "57014", "26000"),
            *("XX000", "XX001", "P0001", "terminate"),
        )
    },
}


@pytest.fixture
async def role(database_url: str) -> AsyncGenerator[Role]:
    """Provide a role with the documented rights, which may use the trigger of the tests."""
    async with service_role(database_url) as role:
        await commit_faults.install(database_url)
        for kind in ("TABLES", "SEQUENCES"):
            await fetch(database_url, f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {role.name}")
        yield role


@asynccontextmanager
async def occurring(
    cluster: Cluster, database_url: str, role: Role, fault: Fault
) -> AsyncGenerator[None]:
    """Let a fault occur during the block."""
    admin, name = cluster.url("postgres"), database_name(database_url)

    async def end_sessions() -> None:
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
        await fetch(admin, terminate, role.name)

    async def run(statements: tuple[str, ...]) -> None:
        for statement in statements:
            # A session of the database itself may be read-only.
            url = admin if statement.startswith(("ALTER ROLE", "ALTER DATABASE")) else database_url
            await fetch(url, statement.format(role=role.name, name=name))

    async with AsyncExitStack() as stack:
        await run(fault.causes)
        if fault.ends_sessions:
            stack.push_async_callback(end_sessions)
        stack.push_async_callback(run, fault.remedies)
        if fault.ends_sessions:
            await end_sessions()
        if fault.state is not None:
            await commit_faults.arm(database_url, fault.state, 1_000)
            stack.push_async_callback(commit_faults.arm, database_url, "40001", 0)
        if fault.locks is not None:
            holder = await stack.enter_async_context(connected_to(database_url))
            await holder.execute(f"BEGIN; LOCK TABLE {fault.locks} IN ACCESS EXCLUSIVE MODE")
        yield


def rejections(cluster: Cluster, start: int) -> int:
    """Count the connections that the server has rejected since a position in its log."""
    with cluster.postgres.log.open("rb") as log:
        log.seek(start)
        return log.read().count(b"> FATAL: ")


async def answer_calls(chat: Chat, stored: list[message_pb2.AppendMessagesRequest]) -> None:
    """Make calls of every kind at the same time, and wait until each is answered."""
    session_id = stored[0].session_id
    ids: dict[str, Any] = {"user_id": chat.user_id, "session_id": session_id}
    new = [
        message_pb2.AppendMessagesRequest(**ids, messages=new_messages(1)) for _ in range(RETRIES)
    ]
    update = session_pb2.UpdateSessionRequest(
        user_id=chat.user_id, session=session_pb2.Session(id=session_id, title="new")
    )
    update.update_mask.paths.append("title")
    page = message_pb2.ListMessagesRequest(**ids)
    context = message_pb2.GetContextRequest(**ids)
    calls: list[Awaitable[object]] = [
        *(chat.stub.AppendMessages(append, timeout=CALL_TIMEOUT_S) for append in (*stored, *new)),
        *(chat.stub.UpdateSession(update, timeout=CALL_TIMEOUT_S) for _ in range(4)),
        *(chat.stub.ListMessages(page, timeout=CALL_TIMEOUT_S) for _ in range(4)),
        *(chat.stub.GetContext(context, timeout=CALL_TIMEOUT_S) for _ in range(4)),
    ]
    await asyncio.gather(*calls, return_exceptions=True)


CALLS = 2 * RETRIES + 3 * 4
"""The number of calls that `answer_calls` makes."""


async def prepare(server: Server, chat: Chat) -> list[message_pb2.AppendMessagesRequest]:
    """Store messages of a new session; return the requests, whose repetition looks them up."""
    session_id = await chat.start()
    requests = [
        message_pb2.AppendMessagesRequest(
            user_id=chat.user_id, session_id=session_id, messages=new_messages(1)
        )
        for _ in range(RETRIES)
    ]
    await asyncio.gather(*(chat.stub.AppendMessages(request) for request in requests))
    assert server.readiness.is_ready
    return requests


@pytest.mark.case(n=524)
@pytest.mark.parametrize("name", FAULTS)
async def test_statements_during_a_fault_are_bounded(
    cluster: Cluster, database_url: str, role: Role, name: str
) -> None:
    loop = asyncio.get_running_loop()
    async with serving(role.url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        stored = await prepare(server, chat)
        async with occurring(cluster, database_url, role, FAULTS[name]):
            sent, log_start = (
                SentStatements(cluster, database_url),
                cluster.postgres.log.stat().st_size,
            )
            started_at = loop.time()
            await answer_calls(chat, stored)
            count = len(sent.so_far()) + rejections(cluster, log_start)
            limit = CALLS * STATEMENTS_PER_CALL + STATEMENTS_PER_S * (loop.time() - started_at)
        assert 0 < count <= limit
        # Nothing is left behind: later calls succeed.
        async with asyncio.timeout(60):
            while not server.readiness.is_ready:
                await asyncio.sleep(0.05)
        await chat.append(stored[0].session_id, "after")
