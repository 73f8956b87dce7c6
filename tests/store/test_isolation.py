"""The sentinel passes every statement of the service and finds those without an owner."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import Any

import pglast
import pytest
from chathistory.v1 import user_pb2
from pglast.stream import RawStream

from service.server import Server
from service.store.db.hot_pool import Statement
from tests.support import owner_checker, sentinel
from tests.support.chat import Chat, new_id, new_messages
from tests.support.cluster import LoggedStatement, all_new_statements, statements_in

ast: Any = pglast.ast

CONSTRAINED = {
    "equal to a parameter": "SELECT * FROM chat_sessions WHERE user_id = $1::UUID AND id = $2",
    "a parameter that equals it": "SELECT 1 FROM chat_sessions AS s WHERE $1 = s.user_id",
    "a user by id": "SELECT * FROM users WHERE users.id = $1",
    "one of two owners": (
        "SELECT 1 FROM chat_messages WHERE user_id IN ($1, '00000000-0000-0000-0000-000000000000')"
    ),
    "one of an array": "SELECT 1 FROM chat_messages WHERE user_id = ANY ($1::uuid[])",
    "a row of owner and id": "DELETE FROM chat_sessions WHERE (user_id, id) = ($1, $2)",
    "joined with unnest": (
        "SELECT s.id FROM unnest($1::uuid[], $2::uuid[]) AS w (user_id, id) "
        "JOIN chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.id"
    ),
    "through another table": (
        "SELECT m.id FROM chat_sessions AS s JOIN chat_messages AS m"
        " ON m.user_id = s.user_id AND m.session_id = s.id WHERE s.user_id = $1"
    ),
    "the optional side of an outer join": (
        "SELECT s.id FROM chat_sessions AS s LEFT JOIN chat_messages AS m"
        " ON m.user_id = s.user_id WHERE s.user_id = $1"
    ),
    "fed from a CTE": (
        "WITH deleted AS (DELETE FROM chat_messages WHERE user_id = $1"
        " RETURNING user_id, session_id) "
        "UPDATE chat_sessions AS s SET message_count = 0"
        " FROM deleted WHERE s.user_id = deleted.user_id"
    ),
    "an inserted parameter": "INSERT INTO chat_sessions (id, user_id) VALUES ($1, $2)",
    "inserted from unnest": (
        "INSERT INTO chat_sessions (user_id, id) SELECT i.u, i.s"
        " FROM unnest($1::uuid[], $2::uuid[]) AS i (u, s)"
    ),
    "an upsert on the owner's key": (
        "INSERT INTO chat_sessions AS s (user_id, id) VALUES ($1, $2)"
        " ON CONFLICT (user_id, id) DO UPDATE SET last_seq = s.last_seq"
        " WHERE NOT EXISTS (SELECT FROM chat_messages AS m WHERE m.user_id = s.user_id)"
    ),
    "a subquery for the outer row's owner": (
        "SELECT 1 FROM chat_sessions AS s WHERE s.user_id = $1 AND EXISTS (SELECT"
        " FROM chat_messages AS m WHERE m.user_id = s.user_id)"
    ),
    "a table without owners": "SELECT min_build FROM schema_info",
}

UNCONSTRAINED = {
    "by id alone": "SELECT * FROM chat_sessions WHERE id = $1",
    "all rows": "SELECT count(*) FROM chat_messages",
    "an alternative": "SELECT 1 FROM chat_sessions WHERE user_id = $1 OR id = $2",
    "all owners except one": "SELECT 1 FROM chat_sessions WHERE user_id != $1",
    "a negated owner": "SELECT 1 FROM chat_sessions WHERE NOT (user_id = $1)",
    "a range of owners": "SELECT 1 FROM chat_sessions WHERE user_id >= $1",
    "a column equal to itself": "SELECT 1 FROM chat_sessions AS s WHERE s.user_id = s.user_id",
    "a literal": (
        "SELECT 1 FROM chat_sessions WHERE user_id = '0192d3a4-0000-7000-8000-000000000001'"
    ),
    "a join by the session alone": (
        "SELECT 1 FROM chat_sessions AS s JOIN chat_messages AS m ON m.session_id = s.id"
        " WHERE s.user_id = $1"
    ),
    "a join that constrains the other side": (
        "SELECT 1 FROM chat_sessions AS s LEFT JOIN chat_messages AS m"
        " ON s.user_id = $1 AND m.user_id = $1"
    ),
    "two tables that only equal each other": (
        "SELECT 1 FROM chat_sessions AS s JOIN chat_messages AS m"
        " ON m.user_id = s.user_id WHERE s.id = $1"
    ),
    "a subquery without an owner": (
        "SELECT 1 FROM users WHERE id = $1 AND EXISTS (SELECT FROM chat_sessions AS s"
        " WHERE s.id = $2)"
    ),
    "a subquery in the select list": (
        "SELECT (SELECT count(*) FROM chat_messages) FROM users WHERE id = $1"
    ),
    "a subquery in FROM": (
        "SELECT 1 FROM (SELECT user_id FROM chat_sessions) AS s WHERE s.user_id = $1"
    ),
    "a CTE without an owner": (
        "WITH s AS (SELECT user_id FROM chat_sessions) SELECT 1 FROM s WHERE s.user_id = $1"
    ),
    "one branch of a union": (
        "SELECT id FROM users WHERE id = $1 UNION ALL SELECT id FROM chat_sessions WHERE id = $1"
    ),
    "an update of all rows": "UPDATE chat_sessions SET title = $1",
    "an update of the owner": "UPDATE chat_sessions SET user_id = id WHERE user_id = $1",
    "an update by id": "UPDATE chat_messages SET content = $1 WHERE session_id = $2 AND id = $3",
    "a delete by id": "DELETE FROM chat_sessions WHERE id = $1",
    "an insert of another row's owner": (
        "INSERT INTO chat_sessions (user_id, id) SELECT s.id, $1 FROM chat_sessions AS s"
        " WHERE s.user_id = $2"
    ),
    "an insert without an owner": "INSERT INTO chat_messages (session_id, id) VALUES ($1, $2)",
    "one row of an insert": (
        "INSERT INTO chat_sessions (user_id, id) VALUES ($1, $2), (gen_random_uuid(), $3)"
    ),
    "an upsert on another key": (
        "INSERT INTO users AS u (id, external_id) VALUES ($1, $2)"
        " ON CONFLICT (external_id) DO UPDATE SET name = excluded.name"
    ),
    "an explained statement": "EXPLAIN ANALYZE DELETE FROM chat_messages",
    "a copy": "COPY users TO STDOUT",
    "a truncation": "TRUNCATE chat_messages",
    "a merge": (
        "MERGE INTO chat_sessions AS s USING users AS u ON s.user_id = u.id"
        " WHEN MATCHED THEN DELETE"
    ),
    "a DO block": "DO $$ BEGIN DELETE FROM users; END $$",
    "almost an exempt statement": (
        "SELECT id FROM users WHERE users.id > $1::UUID ORDER BY users.id"
    ),
    "a second statement": "SELECT 1; DELETE FROM users",
    "a syntax error": "SELEC 1",
}


@pytest.mark.parametrize("sql", CONSTRAINED.values(), ids=CONSTRAINED.keys())
def test_a_statement_constrained_to_an_owner_passes(sql: str) -> None:
    assert sentinel.problems(sql) == ()


@pytest.mark.parametrize("sql", UNCONSTRAINED.values(), ids=UNCONSTRAINED.keys())
def test_a_statement_without_an_owner_is_a_problem(sql: str) -> None:
    assert sentinel.problems(sql)


def test_the_tables_of_users_data_have_owners() -> None:
    assert {"users", "chat_sessions", "chat_messages"} <= set(owner_checker.OWNERS)


async def test_a_statement_of_the_driver_without_an_owner_is_reported(server: Server) -> None:
    statement = Statement.from_text("SELECT count(*)\nFROM chathistory.chat_messages")
    await server.database.fetch_once(statement)
    (problem,) = sentinel.complaints(all_new_statements())
    assert "chat_messages: user_id is not constrained" in problem.replace(" AS chat_messages", "")
    assert "SELECT count(*)\nFROM chat_messages" in problem


async def test_a_statement_of_another_process_without_an_owner_is_reported(
    database_url: str,
) -> None:
    program = f"""
import asyncio, asyncpg
async def main():
    connection = await asyncpg.connect({database_url!r})
    await connection.execute("UPDATE chathistory.chat_sessions SET title = ''")
    await connection.close()
asyncio.run(main())
"""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=True)
    (problem,) = sentinel.complaints(all_new_statements())
    assert "chat_sessions: user_id is not constrained" in problem.replace(" AS chat_sessions", "")


async def call_every_method(chat: Chat) -> None:
    """Call every method, so that every statement is sent."""
    stub = chat.stub
    user = user_pb2.User(id=chat.user_id, email="user@example.com", external_id="external")
    await stub.UpdateUser(user_pb2.UpdateUserRequest(user=user))
    for key in (
        {"user_id": chat.user_id},
        {"email": "user@example.com"},
        {"external_id": "external"},
    ):
        await stub.GetUser(user_pb2.GetUserRequest(**key))
    await stub.ListUsers(user_pb2.ListUsersRequest())
    session = await chat.create_session(title="one")
    sent = new_messages(4)
    for request in (sent, sent, new_messages(1)):
        await chat.append(session.id, request)
    await chat.append(new_id(), new_messages(1), create_if_missing=True)
    await chat.get_session(session.id)
    _ = [page async for page in chat.session_pages(page_size=1)]
    await chat.list_sessions(state="SESSION_STATE_ARCHIVED")
    await chat.update_session(id=session.id, title="two")
    await chat.fork(session.id, 3)
    await chat.get(session.id, sent[0].id)
    for order in ("MESSAGE_ORDER_ASC", "MESSAGE_ORDER_DESC"):
        _ = await chat.all(session.id, page_size=2, order=order)
    await chat.context(session.id)
    watch = chat.watch(session.id)
    await watch.read()
    watch.cancel()
    await chat.update(session.id, sent[1].id, content="changed")
    await chat.delete(session.id, sent[2].id)
    await chat.delete_session(session.id)
    await stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))


def without_owners(sql: str) -> str:
    """Replace every condition on an owner by TRUE."""
    owner_columns = set(owner_checker.OWNERS.values())

    def is_owner(node: Any) -> bool:
        return (
            isinstance(node, ast.ColumnRef)
            and getattr(node.fields[-1], "sval", None) in owner_columns
        )

    tree = pglast.parse_sql(sql)
    for node in list(owner_checker.nodes_of([statement.stmt for statement in tree])):
        for name in node:
            value = getattr(node, name)
            if isinstance(value, tuple):
                setattr(
                    node,
                    name,
                    tuple(_true() if _is_equality(item, is_owner) else item for item in value),
                )
            elif _is_equality(value, is_owner):
                setattr(node, name, _true())
    return str(RawStream()(tree))


def _is_equality(node: Any, is_owner: Any) -> bool:
    return isinstance(node, ast.A_Expr) and any(map(is_owner, (node.lexpr, node.rexpr)))


def _true() -> Any:
    return ast.A_Const(val=ast.Boolean(boolval=True))


async def test_every_statement_of_the_service_passes_only_with_its_owner(
    chat: Chat,
) -> None:
    all_new_statements()
    await call_every_method(chat)
    seen = all_new_statements()
    assert sentinel.complaints(seen) == []
    flat = {" ".join(statement.sql.split()).rstrip("; ") for statement in seen}
    for name in ("list users", "look a user up by e-mail address", "look a user up by external id"):
        assert any(re.fullmatch(sentinel.NAMED[name], sql) for sql in flat), (
            f"{name}: no statement of the service matches"
        )
    reading = [sql for sql in flat if _touches_rows(sql)]
    assert len(reading) > 20
    passing = [sql for sql in reading if not sentinel.problems(without_owners(sql))]
    # A plain INSERT has no condition to replace: it supplies the owner.
    assert [
        sql for sql in passing if without_owners(sql) != RawStream()(pglast.parse_sql(sql))
    ] == []
    assert all(sql.startswith("INSERT INTO") for sql in passing)


def _touches_rows(sql: str) -> bool:
    names = {
        getattr(node, "relname", None)
        for node in owner_checker.nodes_of([statement.stmt for statement in pglast.parse_sql(sql)])
    }
    named = any(re.fullmatch(pattern, sql) for pattern in sentinel.NAMED.values())
    return bool(names & set(owner_checker.OWNERS)) and not named


def test_statements_of_the_tests_are_ignored() -> None:
    log = (
        "<chat-history|test_1> LOG:  execute __asyncpg_stmt_1__: SELECT 1\n\tFROM a\n"
        "<test-support|test_1> LOG:  statement: SELECT 2\n"
        "<chat-history|test_1> ERROR:  no such thing\n<chat-history|test_1> STATEMENT:  SELECT 3\n"
        "<|test_2> LOG:  statement: BEGIN;\n"
    )
    assert list(statements_in(log)) == [
        LoggedStatement("chat-history", "test_1", "SELECT 1\nFROM a"),
        LoggedStatement("", "test_2", "BEGIN;"),
    ]
