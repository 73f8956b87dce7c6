"""Calls, errors, lists, ids, health and tracing, against a real server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from chathistory_client import (
    AlreadyExists,
    ChatHistoryClient,
    ChatHistoryError,
    Conflict,
    FailedPrecondition,
    FieldViolation,
    HealthStatus,
    InvalidArgument,
    Message,
    MessageOrder,
    NotFound,
    Overloaded,
    Part,
    Role,
    Session,
    SessionState,
    Unavailable,
    message,
    new_id,
    trace_context,
)
from chathistory_client.channels import MAX_STREAMS_PER_CHANNEL
from chathistory_client.errors import from_rpc_error
from service.errors import Unavailable as ServiceUnavailable
from service.server import Server
from tests.support.clients import client_of
from tests.support.ports import UNUSED_ADDRESS
from tests.support.servers import serving


async def test_rejected_field_is_named_in_violations(client: ChatHistoryClient, owner: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.append_messages(user_id=owner, messages=[message("user", "a\0b")])

    assert caught.value.reason == "FIELD_VIOLATION"
    assert [violation.field for violation in caught.value.violations] == ["messages[0].content"]
    assert isinstance(caught.value.violations[0], FieldViolation)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "FIELD_VIOLATION" in str(caught.value)


async def test_get_missing_session_raises_not_found_with_its_id(
    client: ChatHistoryClient, owner: str
) -> None:
    missing = new_id()
    with pytest.raises(NotFound) as caught:
        await client.get_session(user_id=owner, session_id=missing)

    assert (caught.value.reason, caught.value.metadata) == (
        "SESSION_NOT_FOUND",
        {"session_id": missing},
    )


async def test_conflicting_writes_raise_distinct_errors_and_reasons(
    client: ChatHistoryClient, owner: str
) -> None:
    reply = await client.append_messages(
        user_id=owner, messages=[message("user", "1"), message("user", "2")]
    )
    session: dict[str, Any] = {"user_id": owner, "session_id": reply.session_id}

    with pytest.raises(Conflict) as moved:
        await client.append_messages(
            **session, messages=[message("user", "3")], expected_last_seq=1
        )
    with pytest.raises(AlreadyExists) as reused:
        await client.append_messages(
            **session, messages=[message("user", "another", id=reply.messages[0].id)]
        )
    with pytest.raises(Conflict) as stale:
        await client.update_session(**session, title="x", etag="stale")
    await client.update_session(**session, state=SessionState.SESSION_STATE_ARCHIVED)
    with pytest.raises(FailedPrecondition) as archived:
        await client.append_messages(**session, messages=[message("user", "4")])

    assert (moved.value.reason, moved.value.metadata["last_seq"]) == ("LAST_SEQ_MISMATCH", "2")
    assert reused.value.reason == "MESSAGE_ID_REUSED"
    assert stale.value.reason == "ETAG_MISMATCH"
    assert archived.value.reason == "SESSION_ARCHIVED"


async def test_overloaded_call_raises_with_retry_after_and_is_not_retried(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = count_attempts(server, monkeypatch)
    for name in ("limit", "hard_limit"):
        monkeypatch.setattr(server.calls, name, 0)
    with pytest.raises(Overloaded) as caught:
        await client.get_user(user_id=owner)

    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    assert len(attempts) == 1


async def test_unavailable_call_is_attempted_five_times(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[None] = []

    def refuse(*_: object) -> None:
        attempts.append(None)
        raise ServiceUnavailable("try again", reason="DATABASE_UNAVAILABLE", retry_after=0.1)

    monkeypatch.setattr(server.calls, "enter", refuse)
    with pytest.raises(Unavailable) as caught:
        await client.get_user(user_id=owner)

    assert (caught.value.reason, caught.value.retry_after) == ("DATABASE_UNAVAILABLE", 0.1)
    assert len(attempts) == 5


@pytest.mark.faults
async def test_call_to_draining_replica_is_repeated_until_it_is_accepted_or_times_out(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = count_attempts(server, monkeypatch)
    monkeypatch.setattr(server.calls, "is_draining", True)
    pending = asyncio.create_task(client.get_user(user_id=owner))
    while len(attempts) <= 10:  # More attempts than gRPC makes for one call.
        await asyncio.sleep(0.01)
    monkeypatch.setattr(server.calls, "is_draining", False)
    assert (await pending).id == owner

    monkeypatch.setattr(server.calls, "is_draining", True)
    with pytest.raises(Unavailable) as caught:
        await client.get_user(user_id=owner, timeout=3.0)
    assert (caught.value.reason, caught.value.retry_after) == ("DRAINING", 0.1)


async def test_call_cancelled_by_a_closing_server_is_repeated() -> None:
    """A closing gRPC server cancels such calls itself, without a reason."""
    calls = 0

    async def answer(_request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            await context.abort(grpc.StatusCode.CANCELLED)
        return b""

    async with serving_get_user(answer) as address, client_of(address) as client:
        await client.get_user(user_id=new_id())
    assert calls == 3


async def test_append_accepted_on_retry_is_not_reported_as_replayed(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.calls, "is_draining", True)
    asyncio.get_running_loop().call_later(0.15, setattr, server.calls, "is_draining", False)

    reply = await client.append_messages(user_id=owner, messages=[message("user", "hello")])

    assert [entry.replayed for entry in reply.messages] == [False]


def count_attempts(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Record one entry for each call that reaches the server's admission."""
    attempts: list[None] = []
    enter = server.calls.enter

    def count(owner_id: str) -> None:
        attempts.append(None)
        enter(owner_id)

    monkeypatch.setattr(server.calls, "enter", count)
    return attempts


async def test_append_without_ids_creates_them_and_leaves_the_passed_messages_unchanged(
    client: ChatHistoryClient, owner: str
) -> None:
    bare = Message(role=Role.ROLE_USER, content="no id")
    first = await client.append_messages(user_id=owner, messages=[bare])
    again = await client.append_messages(
        user_id=owner, session_id=first.session_id, messages=[bare]
    )

    assert bare.id == ""
    assert first.messages[0].id != again.messages[0].id
    assert uuid.UUID(first.messages[0].id).version == 7


async def test_new_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert [id_[:8] for id_ in ids] == sorted(id_[:8] for id_ in ids)


async def test_create_repeated_with_the_same_id_returns_the_stored_resource(
    client: ChatHistoryClient, owner: str
) -> None:
    session_id, user_id = new_id(), new_id()
    sessions = [
        await client.create_session(user_id=owner, session_id=session_id, title="T")
        for _ in range(2)
    ]
    users = [
        await client.create_user(user_id=user_id, name="N", metadata={"a": [1, None]})
        for _ in range(2)
    ]

    assert sessions[0] == sessions[1]
    assert users[0] == users[1]


async def test_update_changes_only_the_passed_fields_and_clears_empty_ones(
    client: ChatHistoryClient, owner: str
) -> None:
    session = await client.create_session(user_id=owner, title="T", summary="S", metadata={"a": 1})
    changed = await client.update_session(
        user_id=owner, session_id=session.id, title="", metadata=None
    )

    assert (changed.title, changed.summary, len(changed.metadata.fields)) == ("", "S", 0)
    with pytest.raises(ValueError, match="no field to update: pass at least one of title"):
        await client.update_session(user_id=owner, session_id=session.id)


async def test_parts_and_metadata_are_stored_and_can_be_cleared(
    client: ChatHistoryClient, owner: str
) -> None:
    sent = message(
        "user",
        "hi",
        parts=[Part(text="hi")],
        metadata={"n": {"l": [1, "two", None, True]}},
        token_count=3,
    )
    reply = await client.append_messages(user_id=owner, messages=[sent])
    ids: dict[str, Any] = {
        "user_id": owner,
        "session_id": reply.session_id,
        "message_id": sent.id,
    }

    stored = await client.get_message(**ids)
    assert (stored.parts, stored.metadata, stored.token_count) == (sent.parts, sent.metadata, 3)

    changed = await client.update_message(**ids, parts=[], token_count=None)
    assert (len(changed.parts), changed.HasField("token_count"), changed.content) == (
        0,
        False,
        "hi",
    )


async def test_list_returns_all_items_by_iteration_and_one_page_by_await(
    client: ChatHistoryClient, owner: str
) -> None:
    reply = await client.append_messages(
        user_id=owner, messages=[message("user", str(n)) for n in range(7)]
    )
    oldest_first = client.list_messages(user_id=owner, session_id=reply.session_id, page_size=3)
    newest_first = client.list_messages(
        user_id=owner,
        session_id=reply.session_id,
        page_size=3,
        order=MessageOrder.MESSAGE_ORDER_DESC,
    )

    assert [item.seq async for item in oldest_first] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(page.messages) async for page in oldest_first.pages()] == [3, 3, 1]
    assert [item.seq for item in (await newest_first).messages] == [7, 6, 5]


async def test_fork_survives_the_deletion_of_its_source(
    client: ChatHistoryClient, owner: str
) -> None:
    reply = await client.append_messages(
        user_id=owner,
        messages=[message("user", "q"), message("assistant", "a")],
        session=Session(title="T"),
    )
    fork = await client.fork_session(user_id=owner, session_id=reply.session_id, through_seq=1)
    await client.delete_message(user_id=owner, session_id=fork.id, message_id=reply.messages[0].id)
    await client.delete_session(user_id=owner, session_id=reply.session_id)

    assert (fork.title, fork.last_seq) == ("T", 1)
    assert [item async for item in client.list_messages(user_id=owner, session_id=fork.id)] == []
    with pytest.raises(NotFound):
        await client.delete_session(user_id=owner, session_id=reply.session_id)
    await client.delete_session(user_id=owner, session_id=reply.session_id, allow_missing=True)


async def test_health_of_a_ready_server_is_serving_by_name(client: ChatHistoryClient) -> None:
    await client.wait_until_ready(timeout=30)
    assert await client.check_health("database") is HealthStatus.SERVING
    assert await client.check_health("liveness") is HealthStatus.SERVING
    assert await client.check_health("no such name") is HealthStatus.UNKNOWN


async def test_health_without_a_server_is_unreachable_before_its_timeout() -> None:
    async with client_of(UNUSED_ADDRESS) as client:
        async with asyncio.timeout(15):
            assert await client.check_health("database", timeout=30) is HealthStatus.UNREACHABLE
        with pytest.raises(Unavailable, match=r"not ready after 0\.2 s"):
            await client.wait_until_ready(timeout=0.2)


async def test_wait_until_ready_limits_each_check_to_the_remaining_time() -> None:
    remaining_s: list[float] = []

    async def hang(_request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        remaining_s.append(context.time_remaining())
        await asyncio.Event().wait()
        return b""

    async with (
        serving_method("grpc.health.v1.Health", "Check", hang) as address,
        client_of(address) as client,
    ):
        with pytest.raises(Unavailable, match=r"not ready after 0\.5 s \(unreachable\)"):
            await client.wait_until_ready(timeout=0.5)
    assert remaining_s
    assert max(remaining_s) < 1  # gRPC rounds a timeout up when it sends it.


async def test_streams_beyond_the_limit_of_a_channel_open_another_channel(
    database_url: str,
) -> None:
    count = MAX_STREAMS_PER_CHANNEL + 20
    async with (
        serving(database_url, max_calls_per_connection=2 * MAX_STREAMS_PER_CHANNEL) as server,
        client_of(server.address) as client,
        AsyncExitStack() as stack,
    ):
        owner = (await client.create_user()).id
        session = await client.create_session(user_id=owner)
        ids: dict[str, Any] = {"user_id": owner, "session_id": session.id}
        streams = [client.watch_messages(**ids) for _ in range(count)]
        for stream in streams:
            stack.push_async_callback(stream.aclose)
        first_items = [asyncio.create_task(anext(stream)) for stream in streams]
        async with asyncio.timeout(30):
            while server.streams.in_flight < count:
                await asyncio.sleep(0.01)
            reply = await client.append_messages(messages=[message("user", "Hello, all")], **ids)
            assert [item.id for item in await asyncio.gather(*first_items)] == [
                reply.messages[0].id
            ] * count
        assert server.streams.in_flight == count


async def test_calls_of_a_closed_client_report_that_it_is_closed(server: Server) -> None:
    async with client_of(server.address) as client:
        owner = (await client.create_user()).id
        session = await client.create_session(user_id=owner)
        watching = asyncio.create_task(
            anext(client.watch_messages(user_id=owner, session_id=session.id))
        )
        await asyncio.sleep(0.1)

    with pytest.raises(Unavailable, match="closed"):
        await watching
    with pytest.raises(RuntimeError, match="closed"):
        await client.get_user(user_id=owner)


async def test_cancelled_task_raises_cancelled_error(client: ChatHistoryClient, owner: str) -> None:
    pending = asyncio.create_task(client.get_user(user_id=owner))
    await asyncio.sleep(0)
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending


def test_get_user_with_two_keys_raises_value_error() -> None:
    with pytest.raises(ValueError, match="pass only one of user_id, email"):
        asyncio.run(ChatHistoryClient().get_user(user_id="a", email="b"))


def test_error_with_corrupt_details_keeps_its_code_and_message() -> None:
    corrupt = aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    for code, error_class in (
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.UNKNOWN, ChatHistoryError),
    ):
        error = from_rpc_error(aio.AioRpcError(code, aio.Metadata(), corrupt, "text", None))
        assert type(error) is error_class
        assert (error.reason, error.message, error.code) == ("", "text", code)


def serving_get_user(
    answer: Callable[..., Awaitable[bytes]],
) -> AbstractAsyncContextManager[str]:
    """Serve GetUser with a function, and yield the address."""
    return serving_method("chathistory.v1.ChatHistoryService", "GetUser", answer)


@asynccontextmanager
async def serving_method(
    service: str, method: str, answer: Callable[..., Awaitable[bytes]]
) -> AsyncGenerator[str]:
    """Serve one method of a service with a function, and yield the address."""
    methods = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server = aio.server(handlers=[grpc.method_handlers_generic_handler(service, methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def metadata_recorder() -> AsyncGenerator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server with empty responses, and the metadata that it received."""
    seen: list[dict[str, Any]] = []

    async def answer(_request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        seen.append({key: value for key, value in context.invocation_metadata() or ()})  # noqa: C416
        return b""

    async with serving_get_user(answer) as address:
        yield address, seen


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_trace_context_is_sent_inside_the_block_only(
    metadata_recorder: tuple[str, list[dict[str, Any]]],
) -> None:
    address, seen = metadata_recorder
    async with client_of(address) as client:
        with trace_context(TRACEPARENT, "vendor=1"):
            await client.get_user(user_id="u")
        with trace_context("not a trace", "vendor=1"):
            await client.get_user(user_id="u")
        await client.get_user(user_id="u")

    assert [(metadata.get("traceparent"), metadata.get("tracestate")) for metadata in seen] == [
        (TRACEPARENT, "vendor=1"),
        (None, None),
        (None, None),
    ]


async def test_opentelemetry_context_is_sent_when_the_program_uses_it(
    metadata_recorder: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Propagate:
        @staticmethod
        def inject(carrier: dict[str, str]) -> None:
            carrier["traceparent"] = TRACEPARENT

    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.propagate", Propagate)
    address, seen = metadata_recorder
    async with client_of(address) as client:
        await client.get_user(user_id="u")

    assert seen[0]["traceparent"] == TRACEPARENT
