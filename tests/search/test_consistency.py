"""Any sequence of writes, crashes and outages leaves an index that equals PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from chathistory.v1 import search_pb2, user_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from service.search import indexer, rebuild
from service.search.service import Search
from service.server import Server
from tests.search.index_check import assert_index_equals_postgres
from tests.search.library import Library
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import wait_until_searchable
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.servers import connected, serving

pytestmark = pytest.mark.faults  # Slow.

STEPS = (
    "create_document",
    "append_chunk",
    "delete_document",
    "start_session",
    "edit_messages",
    "delete_messages",
    "delete_session",
    "recreate_user",
    "crash",
    "stop_qdrant",
    "restart_qdrant",
    "rebuild",
)


@pytest.mark.case(n=24)
@pytest.mark.timeout(300)
async def test_index_equals_postgres_after_any_sequence_of_steps(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Leases of a crashed server expire soon.
    monkeypatch.setattr(indexer, "LEASE_S", 2.0)
    monkeypatch.setattr(indexer, "LEASE_MARGIN_S", 1.2)
    monkeypatch.setattr(indexer, "RECHECK_S", 0.2)
    monkeypatch.setattr(rebuild, "LEASE_S", 2.0)

    async def run(steps: Sequence[str]) -> None:
        name = await cluster.create_database()
        qdrant = QdrantServer()
        await qdrant.start()
        try:
            await run_steps(cluster.url(name), qdrant, steps)
        finally:
            await qdrant.stop()
            await qdrant.engine.close()
            await cluster.drop_database(name)

    loop = asyncio.get_running_loop()

    @settings(max_examples=12)
    @given(st.lists(st.sampled_from(STEPS), min_size=3, max_size=14))
    def run_example(steps: list[str]) -> None:
        asyncio.run_coroutine_threadsafe(run(steps), loop).result(120)

    await asyncio.to_thread(run_example)


async def run_steps(url: str, qdrant: QdrantServer, steps: Sequence[str]) -> None:
    """Run steps, on a new server after each crash, and compare the index at the end."""
    pending = list(steps)
    user_id = ""
    while True:
        async with serving(url, **qdrant.settings) as server, connected(server.address) as stub:
            user_id = user_id or (await Chat.of_new_user(stub)).user_id
            run = await Run.create(server, Library(Chat(stub, user_id)), qdrant)
            has_crashed = await run.until_crash(pending)
            if not has_crashed:
                await qdrant.stop()
                await qdrant.start()
                await wait_until_searchable(server)
                await assert_index_equals_postgres(url, server, qdrant)
                return


@dataclass
class Run:
    """The steps on one server, from its start to its crash."""

    server: Server
    library: Library
    qdrant: QdrantServer
    document_ids: list[str]
    session_ids: list[str]

    @classmethod
    async def create(cls, server: Server, library: Library, qdrant: QdrantServer) -> Run:
        """Return a run that knows the documents and sessions of earlier runs."""
        document_ids = [document.id for document in await library.list_all()]
        sessions = (await library.chat.list_sessions()).sessions
        session_ids = [session.id for session in sessions]
        return cls(server, library, qdrant, document_ids, session_ids)

    async def until_crash(self, pending: list[str]) -> bool:
        """Take and run steps; return True after a crash, False when no step is left."""
        while pending:
            step = pending.pop(0)
            if step == "crash":
                self.crash()
                return True
            await getattr(self, step)()
        return False

    def crash(self) -> None:
        """Keep the indexer from releasing its rows at the stop that follows."""
        assert isinstance(self.server.search, Search)
        if self.server.search._indexer is not None:
            self.server.search._indexer._release_batch = _do_nothing  # type: ignore[method-assign, assignment]

    async def create_document(self) -> None:
        document = await self.library.create([f"text {len(self.document_ids)}", "more"])
        self.document_ids.append(document.id)

    async def append_chunk(self) -> None:
        if self.document_ids:
            document_id = self.document_ids[-1]
            count = (await self.library.get(document_id)).chunk_count
            await self.library.append(document_id, count, [f"chunk {count}"])

    async def delete_document(self) -> None:
        if self.document_ids:
            await self.library.delete(self.document_ids.pop(0))

    async def start_session(self) -> None:
        text = f"message {len(self.session_ids)}"
        self.session_ids.append(await self.library.chat.start(text))

    async def edit_messages(self) -> None:
        if self.session_ids:
            session_id = self.session_ids[-1]
            for message in (await self.library.chat.page(session_id)).messages:
                content = f"{message.content}, edited"
                await self.library.chat.update(session_id, message.id, content=content)

    async def delete_messages(self) -> None:
        if self.session_ids:
            session_id = self.session_ids[0]
            for message in (await self.library.chat.page(session_id)).messages:
                await self.library.chat.delete(session_id, message.id)

    async def delete_session(self) -> None:
        if self.session_ids:
            await self.library.chat.delete_session(self.session_ids.pop(0))

    async def recreate_user(self) -> None:
        user_id = self.library.user_id
        await self.library.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=user_id))
        request = user_pb2.CreateUserRequest(user=user_pb2.User(id=user_id))
        await self.library.stub.CreateUser(request)
        self.document_ids, self.session_ids = [], []

    async def stop_qdrant(self) -> None:
        await self.qdrant.stop()

    async def restart_qdrant(self) -> None:
        await self.qdrant.stop()
        await self.qdrant.start()

    async def rebuild(self) -> None:
        """Start a rebuild and cancel its call, which must not cancel the rebuild."""
        if not self.server.search.is_healthy:
            return

        async def call() -> None:
            async for _ in self.library.stub.RebuildSearchIndex(
                search_pb2.RebuildSearchIndexRequest()
            ):
                pass

        task = asyncio.create_task(call())
        await asyncio.wait([task], timeout=0.2)
        task.cancel()
        await asyncio.wait([task])


async def _do_nothing(*_: object) -> None:
    pass
