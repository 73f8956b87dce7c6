"""The metadata `read_consistency`: the calls that honour it, and what they return.

The replica is the database itself, as far as its data is concerned. tests/faults/test_replicas.py
has a standby, whose data lags.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from chathistory.v1 import document_pb2, export_pb2, message_pb2, session_pb2
from grpc import aio

from service.server import Server
from tests.support.chat import Chat, new_message, new_messages
from tests.support.cluster import Cluster, fetch
from tests.support.failures import assert_fails, assert_field_violations
from tests.support.lagging import ENOUGH, eventual, outcomes, read_from_replica
from tests.support.route import routed_url
from tests.support.servers import connected, serving

DESC = message_pb2.MESSAGE_ORDER_DESC


class Replicated(NamedTuple):
    """A service with a replica, and two users of it, one with a session of 30 messages."""

    server: Server
    chat: Chat
    other: Chat
    session_id: str


@pytest.fixture
async def replicated(database_url: str) -> AsyncGenerator[Replicated]:
    async with (
        serving(
            database_url, DATABASE_READ_URL=routed_url(database_url), read_max_lag=60
        ) as server,
        connected(server.address) as stub,
    ):
        chat, other = await Chat.of_new_user(stub), await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(30))
        yield Replicated(server, chat, other, session_id)
    assert server.budget.held == 0
    assert outcomes(server)["failed"] == 0


async def exported(chat: Chat) -> list[export_pb2.ExportUserDataResponse]:
    request = export_pb2.ExportUserDataRequest(user_id=chat.user_id)
    return [item async for item in chat.stub.ExportUserData(request)]


def search_messages(chat: Chat) -> Awaitable[message_pb2.SearchMessagesResponse]:
    request = message_pb2.SearchMessagesRequest(
        user_id=chat.user_id, query="message", mode=message_pb2.SEARCH_MODE_LEXICAL
    )
    return chat.stub.SearchMessages(request)


def list_documents(chat: Chat) -> Awaitable[document_pb2.ListDocumentsResponse]:
    return chat.stub.ListDocuments(document_pb2.ListDocumentsRequest(user_id=chat.user_id))


def calls_that_may_lag(
    chat: Chat, session_id: str, page_token: str
) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return each call that a replica may serve."""
    return {
        "ListSessions": chat.list_sessions,
        "ListMessages": lambda: chat.page(session_id, page_size=10, page_token=page_token),
        "GetContext": lambda: chat.context(session_id),
        "SearchMessages": lambda: search_messages(chat),
        "ListDocuments": lambda: list_documents(chat),
        "ExportUserData": lambda: exported(chat),
    }


async def test_replica_returns_what_the_primary_does(replicated: Replicated) -> None:
    chat, session_id = replicated.chat, replicated.session_id
    token = (await chat.page(session_id, page_size=10)).next_page_token
    await chat.stub.CreateDocument(
        document_pb2.CreateDocumentRequest(
            user_id=chat.user_id,
            document=document_pb2.Document(title="a document"),
            chunks=[document_pb2.DocumentChunk(text="a chunk")],
        )
    )
    strong = calls_that_may_lag(chat, session_id, token)
    for name, call in calls_that_may_lag(eventual(chat), session_id, token).items():
        before = outcomes(replicated.server)
        expected = await strong[name]()
        assert outcomes(replicated.server) == before, f"{name} was not asked to lag"
        assert await read_from_replica(replicated.server, call) == expected, name


async def test_newest_first_list_is_read_from_the_replica_to_its_end(
    replicated: Replicated,
) -> None:
    lagging = eventual(replicated.chat)
    await read_from_replica(replicated.server, lagging.list_sessions)
    before = outcomes(replicated.server)["replica"]
    messages = await lagging.all(replicated.session_id, page_size=10, order=DESC)
    assert [message.seq for message in messages] == list(range(30, 0, -1))
    assert outcomes(replicated.server)["replica"] == before + 2, "the first page is the primary's"


async def test_end_of_an_ascending_list_is_that_of_the_primary(replicated: Replicated) -> None:
    lagging = eventual(replicated.chat)
    await read_from_replica(replicated.server, lagging.list_sessions)
    before = outcomes(replicated.server)
    messages = await lagging.all(replicated.session_id, page_size=10)
    assert [message.seq for message in messages] == list(range(1, 31))
    after = outcomes(replicated.server)
    assert (after["replica"], after["stale"]) == (before["replica"] + 1, before["stale"] + 1)


async def test_large_pages_and_contexts_are_read_from_the_replica(replicated: Replicated) -> None:
    """They continue behind the bound of the first statement, and hold their bytes until the end."""
    chat, lagging = replicated.chat, eventual(replicated.chat)
    session_id = await chat.start([new_message(f"{number} " * 20_000) for number in range(20)])
    token = (await chat.page(session_id, page_size=2)).next_page_token
    page = await read_from_replica(
        replicated.server, lambda: lagging.page(session_id, page_size=17, page_token=token)
    )
    assert [message.seq for message in page.messages] == list(range(3, 20))
    context = await read_from_replica(replicated.server, lambda: lagging.context(session_id))
    assert context == await chat.context(session_id)


async def test_other_calls_ignore_the_metadata(replicated: Replicated) -> None:
    lagging = eventual(replicated.chat)
    await read_from_replica(replicated.server, lagging.list_sessions)
    before = outcomes(replicated.server)
    message_id = (await lagging.append(replicated.session_id, "one more")).messages[0].id
    await lagging.get_session(replicated.session_id)
    await lagging.get(replicated.session_id, message_id)
    await lagging.page(replicated.session_id)
    await lagging.update_session(["title"], id=replicated.session_id, title="a title")
    await lagging.delete(replicated.session_id, message_id)
    assert outcomes(replicated.server) == before


async def test_users_do_not_read_each_other_through_the_replica(replicated: Replicated) -> None:
    owner, other = eventual(replicated.chat), eventual(replicated.other)
    session_id = replicated.session_id
    await read_from_replica(replicated.server, owner.list_sessions)
    token = (await owner.page(session_id, page_size=10)).next_page_token
    assert not (await read_from_replica(replicated.server, other.list_sessions)).sessions
    hits = await read_from_replica(replicated.server, lambda: search_messages(other))
    assert not hits.hits
    items = await read_from_replica(replicated.server, lambda: exported(other))
    assert [item.WhichOneof("item") for item in items] == ["user"]
    before = outcomes(replicated.server)["missing"]
    await assert_fails(other.context(session_id), "SESSION_NOT_FOUND")
    assert outcomes(replicated.server)["missing"] == before + 1, "the primary was asked, too"
    # The token names the user.
    await assert_fails(other.page(session_id, page_token=token), "BAD_PAGE_TOKEN")


async def test_unknown_value_is_rejected(replicated: Replicated) -> None:
    chat, session_id = replicated.chat, replicated.session_id
    token = (await chat.page(session_id, page_size=10)).next_page_token
    ids: dict[str, Any] = {"user_id": chat.user_id, "session_id": session_id}
    metadata = (("read_consistency", "Eventual"),)
    calls = (
        chat.stub.ListSessions(
            session_pb2.ListSessionsRequest(user_id=chat.user_id), metadata=metadata
        ),
        chat.stub.ListMessages(
            message_pb2.ListMessagesRequest(**ids, page_size=10, page_token=token),
            metadata=metadata,
        ),
        chat.stub.GetContext(message_pb2.GetContextRequest(**ids), metadata=metadata),
        chat.stub.SearchMessages(
            message_pb2.SearchMessagesRequest(user_id=chat.user_id, query="message"),
            metadata=metadata,
        ),
    )
    for call in calls:
        failure = await assert_field_violations(call, "read_consistency")
        assert failure.descriptions == ["must be strong or eventual"]


async def test_service_without_a_replica_reads_the_primary(chat: Chat) -> None:
    """And rejects unknown values where it looks at the metadata."""
    session_id = await chat.start(new_messages(30))
    lagging = eventual(chat)
    assert [session.id for session in (await lagging.list_sessions()).sessions] == [session_id]
    assert len(await lagging.all(session_id, page_size=10)) == 30
    assert await lagging.context(session_id) == await chat.context(session_id)
    request = session_pb2.ListSessionsRequest(user_id=chat.user_id)
    call = chat.stub.ListSessions(request, metadata=(("read_consistency", "weak"),))
    await assert_field_violations(call, "read_consistency")


async def test_tables_that_are_moved_below_the_service_are_read_again(database_url: str) -> None:
    async with (
        serving(
            database_url, DATABASE_READ_URL=routed_url(database_url), read_max_lag=60
        ) as server,
        connected(server.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        lagging = eventual(chat)
        await read_from_replica(server, lagging.list_sessions)
        await fetch(database_url, "ALTER SCHEMA chathistory RENAME TO chat_moved")
        failed = outcomes(server)["failed"]
        async with asyncio.timeout(ENOUGH):
            is_read = False
            while not is_read or outcomes(server)["failed"] == failed:
                await asyncio.sleep(0.05)
                with suppress(aio.AioRpcError):  # The primary has not found the tables yet.
                    await lagging.list_sessions()
                    await chat.list_sessions()
                    is_read = True
        await read_from_replica(server, lagging.list_sessions)


@pytest.fixture
async def other_history_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Provide a database whose counter is higher than any, in another epoch."""
    name = await cluster.create_database()
    url = cluster.url(name)
    await fetch(url, "UPDATE history_epoch SET epoch = gen_random_uuid(), counter = 1000000")
    yield url
    await cluster.drop_database(name)


async def test_replica_of_another_database_is_never_used(
    database_url: str, other_history_url: str, empty_database_url: str
) -> None:
    for url in (other_history_url, empty_database_url):
        async with (
            serving(database_url, DATABASE_READ_URL=routed_url(url)) as server,
            connected(server.address) as stub,
        ):
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            for _ in range(5):
                [session] = (await eventual(chat).list_sessions()).sessions
                assert session.id == session_id
                await server.epoch.raise_mark()
            assert outcomes(server)["replica"] == 0
            assert server.readiness.is_ready
