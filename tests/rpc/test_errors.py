"""The table of errors: each reason is produced once, with its code and details."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest
import structlog
from chathistory.v1 import message_pb2, session_pb2, user_pb2
from grpc import StatusCode, aio

from service.rpc import pipeline
from service.server import Server
from service.store import sessions
from service.store.db import retries
from tests.support import issuer
from tests.support.chat import Chat, new_id, new_message, new_messages
from tests.support.cluster import OWN_SETTINGS, fetch
from tests.support.failures import Failure, assert_fails, assert_field_violations, failure_of
from tests.support.proxy import postgres_proxy
from tests.support.servers import channel, connected, serving

ARCHIVED = session_pb2.SESSION_STATE_ARCHIVED
Produce = Callable[[Chat], Awaitable[Failure]]


async def field_violation(chat: Chat) -> Failure:
    return await assert_field_violations(chat.page("x"), "session_id")


async def bad_page_token(chat: Chat) -> Failure:
    return await failure_of(chat.page(new_id(), page_token="x"))


async def user_not_found(chat: Chat) -> Failure:
    return await failure_of(chat.stub.GetUser(user_pb2.GetUserRequest(user_id=new_id())))


async def session_not_found(chat: Chat) -> Failure:
    return await failure_of(chat.get_session(new_id()))


async def message_not_found(chat: Chat) -> Failure:
    return await failure_of(chat.get(await chat.start(), new_id()))


async def email_taken(chat: Chat) -> Failure:
    request = user_pb2.CreateUserRequest(user=user_pb2.User(email="a@example.com"))
    await chat.stub.CreateUser(request)
    request.user.id = ""
    return await failure_of(chat.stub.CreateUser(request))


async def external_id_taken(chat: Chat) -> Failure:
    request = user_pb2.CreateUserRequest(user=user_pb2.User(external_id="x"))
    await chat.stub.CreateUser(request)
    return await failure_of(chat.stub.CreateUser(request))


async def id_taken(chat: Chat) -> Failure:
    session = await chat.create_session()
    return await failure_of(chat.create_session(id=session.id, title="other"))


async def message_id_reused(chat: Chat) -> Failure:
    session_id = await chat.start([sent := new_message("one")])
    return await failure_of(chat.append(session_id, [new_message("two", id=sent.id)]))


async def etag_mismatch(chat: Chat) -> Failure:
    session = await chat.create_session()
    return await failure_of(chat.update_session(id=session.id, title="x", etag="old"))


async def last_seq_mismatch(chat: Chat) -> Failure:
    return await failure_of(chat.append(await chat.start(), "x", expected_last_seq=0))


async def session_archived(chat: Chat) -> Failure:
    session = await chat.create_session(state=ARCHIVED)
    return await failure_of(chat.append(session.id, "x"))


PLAIN: dict[str, tuple[Produce, StatusCode, set[str]]] = {
    "FIELD_VIOLATION": (field_violation, StatusCode.INVALID_ARGUMENT, set()),
    "BAD_PAGE_TOKEN": (bad_page_token, StatusCode.INVALID_ARGUMENT, set()),
    "USER_NOT_FOUND": (user_not_found, StatusCode.NOT_FOUND, {"user_id"}),
    "SESSION_NOT_FOUND": (session_not_found, StatusCode.NOT_FOUND, {"session_id"}),
    "MESSAGE_NOT_FOUND": (message_not_found, StatusCode.NOT_FOUND, {"session_id", "message_id"}),
    "EMAIL_TAKEN": (email_taken, StatusCode.ALREADY_EXISTS, set()),
    "EXTERNAL_ID_TAKEN": (external_id_taken, StatusCode.ALREADY_EXISTS, set()),
    "ID_TAKEN": (id_taken, StatusCode.ALREADY_EXISTS, {"session_id"}),
    "MESSAGE_ID_REUSED": (
        message_id_reused,
        StatusCode.ALREADY_EXISTS,
        {"session_id", "message_id"},
    ),
    "ETAG_MISMATCH": (etag_mismatch, StatusCode.ABORTED, {"id", "etag"}),
    "LAST_SEQ_MISMATCH": (last_seq_mismatch, StatusCode.ABORTED, {"session_id", "last_seq"}),
    "SESSION_ARCHIVED": (session_archived, StatusCode.FAILED_PRECONDITION, {"session_id"}),
}


@pytest.mark.parametrize("reason", PLAIN)
async def test_error_of_the_caller_has_its_code_and_no_retry_delay(chat: Chat, reason: str) -> None:
    produce, code, metadata = PLAIN[reason]
    failure = await produce(chat)
    assert (failure.code, failure.reason) == (code, reason)
    assert set(failure.metadata) == metadata
    assert failure.retry_after is None, "a retry would not help"
    assert failure.message


async def test_invalid_bytes_are_malformed_request(server: Server) -> None:
    async with channel(server.address) as opened:
        method = opened.unary_unary("/chathistory.v1.ChatHistoryService/GetSession")  # type: ignore[call-arg]
        failure = await assert_fails(method(b"\xff"), "MALFORMED_REQUEST")
    assert failure.code == StatusCode.INVALID_ARGUMENT


async def test_unknown_method_is_unimplemented(server: Server) -> None:
    async with channel(server.address) as opened:
        with pytest.raises(aio.AioRpcError) as caught:
            await opened.unary_unary("/chathistory.v1.ChatHistoryService/DropEverything")(b"")  # type: ignore[call-arg]
    assert caught.value.code() == StatusCode.UNIMPLEMENTED


# --- Errors that a retry can resolve.


@asynccontextmanager
async def locked(url: str, session_id: str) -> AsyncGenerator[None]:
    """Keep a session's row locked, as a long transaction would."""
    connection = await asyncpg.connect(url, server_settings=OWN_SETTINGS)
    try:
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM chat_sessions WHERE id = $1 FOR UPDATE", session_id
            )
            yield
    finally:
        await connection.close()


@pytest.mark.faults
async def test_append_to_a_session_that_stays_locked_is_contention(
    chat: Chat, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        retries, "REPLY_MARGIN_S", 1.0
    )  # A busy machine may deliver the answer late.
    session_id = await chat.start()
    request = message_pb2.AppendMessagesRequest(
        user_id=chat.user_id, session_id=session_id, messages=new_messages(1)
    )
    async with locked(database_url, session_id):
        failure = await assert_fails(chat.stub.AppendMessages(request, timeout=5), "CONTENTION")
    assert (failure.code, failure.retry_after is not None) == (StatusCode.ABORTED, True)
    assert (await chat.stub.AppendMessages(request)).messages[0].seq == 2


async def test_append_to_one_session_succeeds_while_another_is_locked(
    chat: Chat, database_url: str
) -> None:
    held, free = await chat.start(), [await chat.start() for _ in range(8)]
    async with locked(database_url, held):
        waiting = asyncio.create_task(chat.append(held, "later"))
        for session_id in free:
            assert (await chat.append(session_id, "now")).messages[0].seq == 2
        assert not waiting.done()
    assert (await waiting).messages[0].seq == 2


async def test_call_without_a_deadline_gets_the_servers(database_url: str) -> None:
    async with serving(database_url, call_timeout=0.5) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with locked(database_url, session_id):
            failure = await failure_of(chat.update_session(id=session_id, title="x"))
        assert failure.reason in ("CONTENTION", "DEADLINE_EXCEEDED")


async def test_call_ends_at_the_clients_deadline(chat: Chat, database_url: str) -> None:
    session_id = await chat.start()
    request = session_pb2.UpdateSessionRequest(
        user_id=chat.user_id, session=session_pb2.Session(id=session_id, title="x")
    )
    async with locked(database_url, session_id):
        with pytest.raises(aio.AioRpcError) as caught:
            await chat.stub.UpdateSession(request, timeout=0.1)  # Shorter than the wait for a lock.
    assert caught.value.code() == StatusCode.DEADLINE_EXCEEDED


async def test_call_above_the_limit_is_overloaded_with_a_retry_delay(database_url: str) -> None:
    async with (
        serving(database_url, max_in_flight=2, max_watches=1) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with locked(database_url, session_id):
            waiting = [asyncio.create_task(chat.append(session_id, "later")) for _ in range(2)]
            while server.calls.in_flight < 2:
                await asyncio.sleep(0.01)
            failure = await assert_fails(chat.get_session(session_id), "OVERLOADED")
            assert (failure.code, failure.retry_after is not None) == (
                StatusCode.RESOURCE_EXHAUSTED,
                True,
            )
        await asyncio.gather(*waiting)
        await chat.get_session(session_id)
        watch = chat.watch(session_id)
        await watch.read()
        await assert_fails(anext(aiter(chat.watch(session_id))), "OVERLOADED")
        watch.cancel()


async def test_call_to_a_draining_server_is_unavailable(chat: Chat, server: Server) -> None:
    session_id = await chat.start()
    watch = chat.watch(session_id)
    await watch.read()
    server.calls.is_draining = True
    server.watchers.close()
    for call in (chat.get_session(session_id), chat.append(session_id, "x"), watch.read()):
        failure = await assert_fails(call, "DRAINING")
        assert (failure.code, failure.retry_after is not None) == (StatusCode.UNAVAILABLE, True)


@pytest.mark.faults
async def test_call_is_unavailable_during_an_outage_and_served_after_it(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "OUTAGE_TIMEOUT_S", 0.5)
    async with (
        postgres_proxy(database_url) as (proxy, url),
        serving(url) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        proxy.refuse_connections()
        for call in (
            chat.get_session(session_id),
            chat.update_session(id=session_id, title="x"),
            chat.append(session_id, [sent := new_message("x")]),
            chat.page(session_id),
            chat.context(session_id),
        ):
            failure = await assert_fails(call, "DATABASE_UNAVAILABLE")
            assert (failure.code, failure.retry_after is not None) == (StatusCode.UNAVAILABLE, True)
            assert str(proxy.port) not in str(failure)
        proxy.accept_connections()
        assert (await chat.append(session_id, [sent])).messages[0].seq == 2


# --- Internal errors.


@pytest.mark.case(n=4)
async def test_internal_error_reveals_no_exception_text(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session_id = await chat.start("a secret message")

    # A new logger: the module's may be bound to the standard error of an earlier test.
    monkeypatch.setattr(pipeline, "_log", structlog.wrap_logger(structlog.PrintLogger(sys.stderr)))

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("postgresql://somebody:hunter2@db.example/x: a secret message")

    monkeypatch.setattr(sessions, "get", broken)
    failure = await assert_fails(chat.get_session(session_id), "INTERNAL")
    assert (failure.code, failure.message) == (StatusCode.INTERNAL, "internal error")
    assert set(failure.metadata) == {"request_id"}
    written = "".join(capsys.readouterr())
    assert failure.metadata["request_id"] in written
    assert "hunter2" not in written + str(failure)
    assert "a secret message" not in written + str(failure)


async def test_error_of_the_database_reveals_no_database_message(
    chat: Chat, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session_id = await chat.start("a secret message")
    await fetch(database_url, "ALTER TABLE chat_sessions RENAME COLUMN title TO headline")
    for call in (
        chat.get_session(session_id),
        chat.update_session(id=session_id, title="hunter2"),
        chat.context(session_id),
    ):
        failure = await assert_fails(call, "DATABASE_UNAVAILABLE")
        assert "operator" in failure.message
        assert "title" not in str(failure)
    written = "".join(capsys.readouterr())
    assert "hunter2" not in written
    assert "SELECT" not in written
    await fetch(database_url, "ALTER TABLE chat_sessions RENAME COLUMN headline TO title")
    assert (await chat.get_session(session_id)).id == session_id


# --- Permissions.

JWT = {
    "auth": "jwt",
    "jwt_key": issuer.SECRET,
    "jwt_issuer": issuer.ISSUER,
    "jwt_audience": issuer.AUDIENCE,
}


async def test_call_without_a_token_is_unauthenticated(database_url: str) -> None:
    async with serving(database_url, **JWT) as server, connected(server.address) as stub:
        failure = await assert_fails(Chat(stub, new_id()).list_sessions(), "TOKEN_INVALID")
    assert failure.code == StatusCode.UNAUTHENTICATED


async def test_user_may_not_act_for_another_user_or_as_a_service(
    database_url: str,
) -> None:
    async with serving(database_url, **JWT) as server, connected(server.address) as stub:
        service = issuer.bearer_metadata(issuer.service_token())
        created = [
            (
                await stub.CreateUser(
                    user_pb2.CreateUserRequest(user=user_pb2.User(email=f"{n}@x.example")),
                    metadata=service,
                )
            ).user
            for n in range(2)
        ]
        mine, theirs = (user.id for user in created)
        me = issuer.bearer_metadata(issuer.token(mine))
        get = user_pb2.GetUserRequest
        for own in (get(), get(user_id=mine), get(email="0@X.example")):
            assert (await stub.GetUser(own, metadata=me)).user.id == mine
        named = session_pb2.ListSessionsRequest
        assert list((await stub.ListSessions(named(), metadata=me)).sessions) == []
        for call in (
            stub.GetUser(get(user_id=theirs), metadata=me),
            stub.GetUser(get(email="1@x.example"), metadata=me),
            stub.GetUser(get(email="nobody@x.example"), metadata=me),
            stub.ListSessions(named(user_id=theirs), metadata=me),
            stub.UpdateUser(
                user_pb2.UpdateUserRequest(user=user_pb2.User(id=theirs, name="x")), metadata=me
            ),
            stub.AppendMessages(
                message_pb2.AppendMessagesRequest(user_id=theirs, messages=new_messages(1)),
                metadata=me,
            ),
        ):
            failure = await assert_fails(call, "USER_MISMATCH")
            assert failure.code == StatusCode.PERMISSION_DENIED
        for call_ in (
            stub.CreateUser(user_pb2.CreateUserRequest(user=user_pb2.User()), metadata=me),
            stub.ListUsers(user_pb2.ListUsersRequest(), metadata=me),
            stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=mine), metadata=me),
            stub.UpdateUser(
                user_pb2.UpdateUserRequest(user=user_pb2.User(external_id="x")), metadata=me
            ),
            stub.UpdateUser(
                user_pb2.UpdateUserRequest(user=user_pb2.User(email="x@x.example")), metadata=me
            ),
        ):
            failure = await assert_fails(call_, "SERVICE_ONLY")
            assert failure.code == StatusCode.PERMISSION_DENIED
        changed = user_pb2.UpdateUserRequest(user=user_pb2.User(name="me"))
        assert (await stub.UpdateUser(changed, metadata=me)).user.name == "me"


@pytest.mark.parametrize("path_count", [60, 1_000, 200_000])
async def test_update_mask_of_many_unknown_paths_is_rejected(chat: Chat, path_count: int) -> None:
    session = await chat.create_session()
    mask = [f"unknown_{number}" for number in range(path_count)]
    failure = await assert_field_violations(
        chat.update_session(mask, id=session.id, title="t"), "update_mask"
    )
    assert len(failure.message) <= 320
