"""Every call waits for a database connection in its own user's turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from chathistory.v1 import document_pb2, user_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from service.rpc.users import external_id_lookup
from service.server import Server
from service.store.db.database import NO_OWNER, Database
from tests.support.chat import Chat, new_id


@asynccontextmanager
async def all_permits_taken(database: Database) -> AsyncGenerator[None]:
    """Hold every permit for reads while the block runs."""
    released = asyncio.Event()

    async def hold(_connection: AsyncConnection) -> None:
        await released.wait()

    deadline = asyncio.get_running_loop().time() + 60
    holders = [
        asyncio.create_task(database.read(hold, owner_id="holder", deadline=deadline))
        for _ in range(database._permits.permit_count)
    ]
    try:
        while database._permits.free_count:
            await asyncio.sleep(0.01)
        yield
    finally:
        released.set()
        await asyncio.gather(*holders)


async def queued_owners(database: Database, *calls: Awaitable[Any]) -> dict[str, int]:
    """Start calls while no permit is free and return how many of them wait for each owner."""
    permits = database._permits
    async with all_permits_taken(database), asyncio.timeout(20):
        tasks = [asyncio.ensure_future(call) for call in calls]
        while sum(map(len, permits._queues.values())) < len(tasks):
            await asyncio.sleep(0.01)
        queued = {owner_id: len(queue) for owner_id, queue in permits._queues.items()}
    await asyncio.gather(*tasks, return_exceptions=True)
    return queued


async def test_document_reads_and_session_reads_of_one_user_wait_in_one_queue(
    server: Server, chat: Chat, other: Chat
) -> None:
    session = await chat.create_session()
    document = document_pb2.GetDocumentRequest(user_id=chat.user_id, document_id=new_id())
    documents = document_pb2.ListDocumentsRequest(user_id=chat.user_id)
    shared = document_pb2.ListDocumentsRequest(
        user_id=chat.user_id, scope=document_pb2.DOCUMENT_SCOPE_SHARED
    )
    assert await queued_owners(
        server.database,
        chat.get_session(session.id),
        chat.stub.GetDocument(document),
        chat.stub.ListDocuments(documents),
        chat.stub.ListDocuments(shared),
        other.get_session(session.id),
    ) == {chat.user_id: 4, other.user_id: 1}


async def test_token_look_ups_wait_in_a_queue_of_their_external_id(server: Server) -> None:
    find_user = external_id_lookup(server.database)
    deadline = asyncio.get_running_loop().time() + 60
    assert await queued_owners(
        server.database,
        find_user("alice", deadline),
        find_user("alice", deadline),
        find_user("bob", deadline),
    ) == {"external:alice": 2, "external:bob": 1}


async def test_lists_of_users_wait_in_a_queue_of_their_own(server: Server, chat: Chat) -> None:
    after_everyone = await chat.stub.ListUsers(user_pb2.ListUsersRequest(page_size=1))
    assert await queued_owners(
        server.database,
        chat.stub.ListUsers(user_pb2.ListUsersRequest()),
        chat.stub.ListUsers(
            user_pb2.ListUsersRequest(page_token=after_everyone.next_page_token, page_size=1)
        ),
        chat.stub.GetUser(user_pb2.GetUserRequest(email="nobody@example.com")),
        chat.stub.GetUser(user_pb2.GetUserRequest(user_id=chat.user_id)),
    ) == {NO_OWNER: 3, chat.user_id: 1}
