"""Calls, their errors, lists, ids and health, against a real server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
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
from tests.support.ports import NOBODY
from tests.support.servers import serving


async def test_field_violations_name_the_fields(client: ChatHistoryClient, owner: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.append_messages(user_id=owner, messages=[message("user", "a\0b")])

    assert caught.value.reason == "FIELD_VIOLATION"
    assert [found.field for found in caught.value.violations] == ["messages[0].content"]
    assert isinstance(caught.value.violations[0], FieldViolation)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "FIELD_VIOLATION" in str(caught.value)


async def test_not_found_carries_the_id(client: ChatHistoryClient, owner: str) -> None:
    missing = new_id()
    with pytest.raises(NotFound) as caught:
        await client.get_session(user_id=owner, session_id=missing)

    assert (caught.value.reason, caught.value.metadata) == (
        "SESSION_NOT_FOUND",
        {"session_id": missing},
    )


async def test_conflicts_are_told_apart(client: ChatHistoryClient, owner: str) -> None:
    reply = await client.append_messages(
        user_id=owner, messages=[message("user", "1"), message("user", "2")]
    )
    place: dict[str, Any] = {"user_id": owner, "session_id": reply.session_id}

    with pytest.raises(Conflict) as moved:
        await client.append_messages(**place, messages=[message("user", "3")], expected_last_seq=1)
    with pytest.raises(AlreadyExists) as reused:
        await client.append_messages(
            **place, messages=[message("user", "another", id=reply.messages[0].id)]
        )
    with pytest.raises(Conflict) as stale:
        await client.update_session(**place, title="x", etag="stale")
    await client.update_session(**place, state=SessionState.SESSION_STATE_ARCHIVED)
    with pytest.raises(FailedPrecondition) as archived:
        await client.append_messages(**place, messages=[message("user", "4")])

    assert (moved.value.reason, moved.value.metadata["last_seq"]) == ("LAST_SEQ_MISMATCH", "2")
    assert reused.value.reason == "MESSAGE_ID_REUSED"
    assert stale.value.reason == "ETAG_MISMATCH"
    assert archived.value.reason == "SESSION_ARCHIVED"


async def test_overload_says_when_to_come_back_and_is_not_tried_again(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = counted(server, monkeypatch)
    for name in ("limit", "most"):
        monkeypatch.setattr(server.calls, name, 0)
    with pytest.raises(Overloaded) as caught:
        await client.get_user(user_id=owner)

    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    assert len(tries) == 1


async def test_unavailable_is_tried_five_times(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def refuse(*_: object) -> None:
        tries.append(None)
        raise ServiceUnavailable("try again", reason="DATABASE_UNAVAILABLE", retry_after=0.1)

    monkeypatch.setattr(server.calls, "enter", refuse)
    with pytest.raises(Unavailable) as caught:
        await client.get_user(user_id=owner)

    assert (caught.value.reason, caught.value.retry_after) == ("DATABASE_UNAVAILABLE", 0.1)
    assert len(tries) == 5


async def test_a_replica_that_shuts_down_is_asked_until_there_is_another(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = counted(server, monkeypatch)
    monkeypatch.setattr(server.calls, "draining", True)
    asking = asyncio.create_task(client.get_user(user_id=owner))
    while len(tries) <= 10:  # More than gRPC makes for one call.
        await asyncio.sleep(0.01)
    monkeypatch.setattr(server.calls, "draining", False)
    assert (await asking).id == owner

    monkeypatch.setattr(server.calls, "draining", True)
    with pytest.raises(Unavailable) as caught:
        await client.get_user(user_id=owner, timeout=3.0)
    assert (caught.value.reason, caught.value.retry_after) == ("DRAINING", 0.1)


async def test_what_reaches_a_server_as_it_closes_is_sent_again() -> None:
    """gRPC itself cancels it, without a reason."""
    calls = 0

    async def answer(_request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            await context.abort(grpc.StatusCode.CANCELLED)
        return b""

    async with answering(answer) as address, client_of(address) as client:
        await client.get_user(user_id=new_id())
    assert calls == 3


async def test_a_retry_that_gets_through_is_not_noticed(
    client: ChatHistoryClient, owner: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.calls, "draining", True)
    asyncio.get_running_loop().call_later(0.15, setattr, server.calls, "draining", False)

    reply = await client.append_messages(user_id=owner, messages=[message("user", "hello")])

    assert [each.replayed for each in reply.messages] == [False]


def counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Count the calls that reach the server's door."""
    tries: list[None] = []
    enter = server.calls.enter

    def count(owner_id: str) -> None:
        tries.append(None)
        enter(owner_id)

    monkeypatch.setattr(server.calls, "enter", count)
    return tries


async def test_ids_are_made_for_what_has_none_and_the_callers_messages_stay_as_they_are(
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


async def test_ids_sort_by_time_and_never_repeat() -> None:
    made = [new_id() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert [each[:8] for each in made] == sorted(each[:8] for each in made)


async def test_creating_again_with_the_same_id_is_safe(
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


async def test_an_update_changes_what_is_given_and_can_clear(
    client: ChatHistoryClient, owner: str
) -> None:
    session = await client.create_session(user_id=owner, title="T", summary="S", metadata={"a": 1})
    changed = await client.update_session(
        user_id=owner, session_id=session.id, title="", metadata=None
    )

    assert (changed.title, changed.summary, len(changed.metadata.fields)) == ("", "S", 0)
    with pytest.raises(ValueError, match="no field to update: pass at least one of title"):
        await client.update_session(user_id=owner, session_id=session.id)


async def test_parts_and_metadata_travel(client: ChatHistoryClient, owner: str) -> None:
    said = message(
        "user",
        "hi",
        parts=[Part(text="hi")],
        metadata={"n": {"l": [1, "two", None, True]}},
        token_count=3,
    )
    reply = await client.append_messages(user_id=owner, messages=[said])
    place: dict[str, Any] = {
        "user_id": owner,
        "session_id": reply.session_id,
        "message_id": said.id,
    }

    stored = await client.get_message(**place)
    assert (stored.parts, stored.metadata, stored.token_count) == (said.parts, said.metadata, 3)

    changed = await client.update_message(**place, parts=[], token_count=None)
    assert (len(changed.parts), changed.HasField("token_count"), changed.content) == (
        0,
        False,
        "hi",
    )


async def test_pages_and_items(client: ChatHistoryClient, owner: str) -> None:
    reply = await client.append_messages(
        user_id=owner, messages=[message("user", str(n)) for n in range(7)]
    )
    listed = client.list_messages(user_id=owner, session_id=reply.session_id, page_size=3)
    newest = client.list_messages(
        user_id=owner,
        session_id=reply.session_id,
        page_size=3,
        order=MessageOrder.MESSAGE_ORDER_DESC,
    )

    assert [each.seq async for each in listed] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(page.messages) async for page in listed.pages()] == [3, 3, 1]
    assert [each.seq for each in (await newest).messages] == [7, 6, 5]


async def test_forks_and_erases(client: ChatHistoryClient, owner: str) -> None:
    reply = await client.append_messages(
        user_id=owner,
        messages=[message("user", "q"), message("assistant", "a")],
        session=Session(title="T"),
    )
    fork = await client.fork_session(user_id=owner, session_id=reply.session_id, through_seq=1)
    await client.delete_message(user_id=owner, session_id=fork.id, message_id=reply.messages[0].id)
    await client.delete_session(user_id=owner, session_id=reply.session_id)

    assert (fork.title, fork.last_seq) == ("T", 1)
    assert [each async for each in client.list_messages(user_id=owner, session_id=fork.id)] == []
    with pytest.raises(NotFound):
        await client.delete_session(user_id=owner, session_id=reply.session_id)
    await client.delete_session(user_id=owner, session_id=reply.session_id, allow_missing=True)


async def test_health(client: ChatHistoryClient) -> None:
    await client.wait_until_ready(timeout=30)
    assert await client.check_health("database") is HealthStatus.SERVING
    assert await client.check_health("liveness") is HealthStatus.SERVING
    assert await client.check_health("no such name") is HealthStatus.UNKNOWN


async def test_health_of_nothing_is_unreachable_at_once() -> None:
    async with client_of(NOBODY) as nobody:
        async with asyncio.timeout(15):
            assert await nobody.check_health("database", timeout=30) is HealthStatus.UNREACHABLE
        with pytest.raises(Unavailable, match=r"not ready after 0\.2 s"):
            await nobody.wait_until_ready(timeout=0.2)


async def test_more_streams_than_a_connection_takes_get_another(database_url: str) -> None:
    count = MAX_STREAMS_PER_CHANNEL + 20
    async with (
        serving(database_url, max_calls_per_connection=2 * MAX_STREAMS_PER_CHANNEL) as server,
        client_of(server.address) as client,
        AsyncExitStack() as stack,
    ):
        owner = (await client.create_user()).id
        session = await client.create_session(user_id=owner)
        names: dict[str, Any] = {"user_id": owner, "session_id": session.id}
        opened = [client.watch_messages(**names) for _ in range(count)]
        for each in opened:
            stack.push_async_callback(each.aclose)
        following = [asyncio.create_task(anext(each)) for each in opened]
        async with asyncio.timeout(30):
            while server.streams.in_flight < count:
                await asyncio.sleep(0.01)
            reply = await client.append_messages(messages=[message("user", "Hello, all")], **names)
            assert [each.id for each in await asyncio.gather(*following)] == [
                reply.messages[0].id
            ] * count
        assert server.streams.in_flight == count


async def test_a_closed_client_says_so(server: Server) -> None:
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


async def test_a_cancelled_call_is_cancelled(client: ChatHistoryClient, owner: str) -> None:
    calling = asyncio.create_task(client.get_user(user_id=owner))
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


def test_get_user_takes_one_key_only() -> None:
    with pytest.raises(ValueError, match="pass only one of user_id, email"):
        asyncio.run(ChatHistoryClient().get_user(user_id="a", email="b"))


def test_errors_without_details_keep_their_code() -> None:
    spoilt = aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    for code, kind in (
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.UNKNOWN, ChatHistoryError),
    ):
        error = from_rpc_error(aio.AioRpcError(code, aio.Metadata(), spoilt, "words", None))
        assert type(error) is kind
        assert (error.reason, error.message, error.code) == ("", "words", code)


@asynccontextmanager
async def answering(answer: Callable[..., Awaitable[bytes]]) -> AsyncGenerator[str]:
    """Serve GetUser by a function, and give the address."""
    methods = {"GetUser": grpc.unary_unary_rpc_method_handler(answer)}
    server = aio.server(
        handlers=[
            grpc.method_handlers_generic_handler("chathistory.v1.ChatHistoryService", methods)
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def mirror() -> AsyncGenerator[tuple[str, list[dict[str, Any]]]]:
    """Give a server that answers every call with nothing and remembers its metadata."""
    seen: list[dict[str, Any]] = []

    async def answer(_request: bytes, context: aio.ServicerContext[Any, Any]) -> bytes:
        seen.append({key: value for key, value in context.invocation_metadata() or ()})  # noqa: C416 - pairs, whatever the types say
        return b""

    async with answering(answer) as address:
        yield address, seen


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_the_trace_context_is_passed_on(mirror: tuple[str, list[dict[str, Any]]]) -> None:
    address, seen = mirror
    async with client_of(address) as client:
        with trace_context(PARENT, "vendor=1"):
            await client.get_user(user_id="u")
        with trace_context("not a trace", "vendor=1"):
            await client.get_user(user_id="u")
        await client.get_user(user_id="u")

    assert [(each.get("traceparent"), each.get("tracestate")) for each in seen] == [
        (PARENT, "vendor=1"),
        (None, None),
        (None, None),
    ]


async def test_opentelemetrys_context_is_passed_on_where_it_is_in_use(
    mirror: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Propagate:
        @staticmethod
        def inject(carrier: dict[str, str]) -> None:
            carrier["traceparent"] = PARENT

    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.propagate", Propagate)
    address, seen = mirror
    async with client_of(address) as client:
        await client.get_user(user_id="u")

    assert seen[0]["traceparent"] == PARENT
