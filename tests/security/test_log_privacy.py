"""The service's own log holds no content, whatever component fails or reports."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2
from grpc import aio
from sqlalchemy import make_url

import service
from service import doctor
from service.store.db.db_errors import DATABASE_ERRORS, sqlstate
from service.store.tables import SCHEMA
from tests.search.library import LEXICAL, Library
from tests.security.test_erasure import MARKER, create_marked_user, provoke
from tests.support import issuer
from tests.support.chat import new_id, new_message
from tests.support.cluster import Cluster, connected_to
from tests.support.issuer import bearer_metadata, service_token
from tests.support.servers import AsyncStub, ServerProcess, connected, target_of

pytestmark = pytest.mark.quick

SECRET = "xyzzy-7f3a9c-plugh"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that must fail."""
    result = subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    return result


def run_failing_program(log_format: str, loop: str = "uvloop") -> str:
    """Return what the program writes to both of its outputs."""
    result = run_python("-m", "tests.support.failing", SECRET, log_format, loop)
    return result.stdout + result.stderr


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_reports_of_libraries_and_the_interpreter_hold_no_content(
    log_format: str, loop: str
) -> None:
    output = run_failing_program(log_format, loop)
    assert "start of the test" in output
    lines = [line for line in output.splitlines() if SECRET in line]
    assert not lines, "\n".join(lines[:3])


def test_reports_name_the_exception_and_its_location() -> None:
    """The report must be enough to find the fault."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in run_failing_program("json").splitlines()
    ]
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_event.setdefault(line["event"], []).append(line)
    for event in ("with a traceback", "with a traceback, too", "with an exception"):
        (line,) = by_event[event]
        assert line["error"] == "ValueError"
        assert line["where"][0].endswith(" main")
        assert line["where"][1].startswith("failing.py:")
        assert "caused by KeyError" in line["where"]
    reports = by_event["message of a library"]
    first = reports[0]
    assert first["logger"] == "grpc._cython.cygrpc"
    assert first["template"] == "Unexpected [%s] raised by servicer method [%s]"
    assert first["at"].endswith(" fail_in_library_logs")
    assert (first["error"], first["severity"]) == ("ValueError", "error")
    assert {report["logger"] for report in reports} >= {"grpc._cython.cygrpc", "asyncio"}
    sources = [line["source"] for line in by_event["unhandled exception"]]
    assert sources == ["thread", "finalizer", "main"]
    assert all(line["error"] == "ValueError" for line in by_event["unhandled exception"])
    (warning,) = by_event["warning of a library"]
    assert warning["category"] == "RuntimeWarning"
    assert warning["at"].startswith("failing.py:")


def test_unexpected_error_of_a_command_is_shown_without_its_text() -> None:
    """The output of a command is a log where an orchestrator runs it."""
    program = (
        "import sys\n"
        "from service import cli\n"
        "def fail(): raise ValueError(secret)\n"
        "secret = sys.argv.pop()\n"
        "cli.app.command('fail')(fail)\n"
        "cli.main()\n"
    )
    result = run_python("-c", program, "fail", SECRET)
    assert "unexpected ValueError" in result.stderr
    assert "<string>:3 fail" in result.stderr
    assert SECRET not in result.stdout + result.stderr


def test_failure_of_the_search_process_is_logged_without_its_text() -> None:
    program = (
        "import sys, socket\n"
        "from service.search.worker import child\n"
        "async def fail(_): raise ValueError(secret)\n"
        "secret, child.serve = sys.argv.pop(), fail\n"
        "pairs = socket.socketpair(), socket.socketpair()\n"
        "sys.argv += [str(ends[0].detach()) for ends in pairs]\n"
        "child.main()\n"
    )
    result = run_python("-c", program, SECRET)
    assert "unhandled exception" in result.stderr
    assert "<string>:3 fail" in result.stderr
    assert SECRET not in result.stdout + result.stderr


async def test_failing_calls_log_no_content_token_or_password(
    start_process: Callable[..., Awaitable[ServerProcess]], database_url: str, cluster: Cluster
) -> None:
    """Rejected, refused and interrupted calls, and then a database that is gone."""
    password, key = f"{SECRET}-password", f"{SECRET}-key-of-at-least-32-characters"
    url = make_url(database_url).set(password=password).render_as_string(hide_password=False)
    server = await start_process(
        url=url,
        CHAT_HISTORY_AUTH="jwt",
        CHAT_HISTORY_JWT_KEY=key,
        CHAT_HISTORY_JWT_AUDIENCE=issuer.AUDIENCE,
        CHAT_HISTORY_LOG_LEVEL="debug",
    )
    codes: set[str] = set()

    async def attempt(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except aio.AioRpcError as error:
            codes.add(error.code().name)
            return None

    async with connected(server.address) as stub:
        token = service_token(key=key)
        shown: Any = bearer_metadata(token)
        for forged in (SECRET, f"{SECRET}.{SECRET}.{SECRET}", issuer.token(SECRET), token[:-2]):
            request = user_pb2.ListUsersRequest()
            await attempt(stub.ListUsers(request, metadata=bearer_metadata(forged)))
        user = user_pb2.User(id=new_id(), name=SECRET, email=f"{SECRET}@example.com")
        create = user_pb2.CreateUserRequest(user=user)
        await stub.CreateUser(create, metadata=shown)
        create.user.name += "!"
        append = message_pb2.AppendMessagesRequest(
            user_id=user.id, session_id=new_id(), messages=[new_message(SECRET)]
        )
        long_title = session_pb2.Session(title=SECRET * 100)
        invalid = session_pb2.CreateSessionRequest(user_id=user.id, session=long_title)
        tampered = user_pb2.ListUsersRequest(page_token=SECRET)

        async def call_all() -> None:
            await attempt(stub.CreateUser(create, metadata=shown))
            await attempt(stub.AppendMessages(append, metadata=shown))
            await attempt(stub.CreateSession(invalid, metadata=shown))
            await attempt(stub.ListUsers(tampered, metadata=shown))
            await attempt(stub.AppendMessages(append, metadata=shown, timeout=0.001))

        await call_all()
        await cluster.drop_database(str(make_url(database_url).database))
        calls: list[Awaitable[Any]] = [
            stub.AppendMessages(append, metadata=shown, timeout=3),
            stub.CreateUser(create, metadata=shown, timeout=3),
        ]
        await asyncio.gather(*map(attempt, calls))
    await server.stop()
    expected = {"UNAUTHENTICATED", "ALREADY_EXISTS", "NOT_FOUND", "INVALID_ARGUMENT"}
    assert codes > expected, "and at least one code for the database that is gone"
    log = server.log.read_text()
    assert "not ready" in log
    assert SECRET not in log
    assert token not in log


async def test_error_about_data_is_explained_without_the_data(database_url: str) -> None:
    """Commands show the explanation of a database error, and PostgreSQL's text quotes rows."""
    statements: list[tuple[str, Any]] = [
        ("INSERT INTO users (id, name) VALUES (gen_random_uuid(), $1)", SECRET),
        ("INSERT INTO users (id, name, fingerprint) VALUES ($1, '', '')", SECRET),
        ("SELECT $1::text::integer", SECRET),
    ]
    async with connected_to(database_url) as connection:
        for sql, value in statements:
            with pytest.raises(DATABASE_ERRORS) as caught:
                await connection.execute(sql, value)
            assert SECRET in str(caught.value)
            explanation = doctor.explain(caught.value, target_of(database_url))
            assert SECRET not in explanation
            assert str(sqlstate(caught.value)) in explanation


async def test_statements_hold_no_values(stub: AsyncStub, cluster: Cluster) -> None:
    """PostgreSQL logs the text of a failed statement; the tests' cluster logs every one."""
    start = cluster.postgres.log.stat().st_size
    chat = await create_marked_user(stub)
    await provoke(chat)
    library = Library(chat)
    await library.search_messages(MARKER, mode=LEXICAL)
    await library.list_all(source_uri=MARKER)
    (session, *_) = (await chat.list_sessions()).sessions
    await chat.update_session(id=session.id, title=f"new {MARKER}", metadata={MARKER: MARKER})
    (message, *_) = await chat.all(session.id)
    await chat.update(session.id, message.id, content=f"new {MARKER}")
    user = user_pb2.User(id=chat.user_id, email=f"new-{MARKER}@example.com", external_id=MARKER)
    await stub.UpdateUser(user_pb2.UpdateUserRequest(user=user))
    await stub.GetUser(user_pb2.GetUserRequest(external_id=MARKER))
    log = cluster.postgres.log.read_bytes()[start:].decode(errors="replace")
    assert f"INSERT INTO {SCHEMA}.users" in log
    assert MARKER not in log


def test_no_statement_is_built_with_values_as_literals() -> None:
    words = re.compile(r"literal_binds|literal_execute|render_postcompile|process_literal_param")
    for path in Path(service.__file__).parent.rglob("*.py"):
        assert not words.search(path.read_text()), path
