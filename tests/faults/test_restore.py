"""The database goes back in time: a dump is restored, or a failover loses the last commits."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from grpc import aio
from qdrant_client import models

from service.embedded.programs import environment, find_programs
from service.search.service import Search
from service.search.types import MARK_POINT
from service.server import Server
from service.store import watch
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.search.index_check import assert_index_equals_postgres
from tests.search.qdrant_server import QdrantServer
from tests.search.waits import (
    wait_until,
    wait_until_built,
    wait_until_indexed,
    wait_until_searchable,
)
from tests.support.chat import Chat, new_message, new_messages
from tests.support.cluster import TESTS_APPLICATION, Cluster
from tests.support.failures import Failure, assert_fails, failure_of, read_failure
from tests.support.lost_history import lose_messages, set_building, set_counter, stored_epoch
from tests.support.servers import connected, serving

pytestmark = [pytest.mark.case(n=517), pytest.mark.timeout(300)]

ENOUGH = 30.0
"""Seconds after which a stream that has not ended is not expected to end."""
LIGHTHOUSE = "The lighthouse shows ships the way"
PUMP = "The pump of the well must be primed with water"
BREAD = "A recipe for bread with rye"


def run_program(name: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs."""
    bin_dir = max(find_programs().items())[1]
    result = subprocess.run(
        [bin_dir / name, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment() | {"PGAPPNAME": TESTS_APPLICATION},
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
async def url(own_cluster: Cluster) -> str:
    """Return the connection string of a migrated database in a PostgreSQL of its own."""
    url = own_cluster.url("postgres")
    await migrations.upgrade(parse(url))
    return url


@pytest.fixture
async def qdrant() -> AsyncGenerator[QdrantServer]:
    """Yield a Qdrant, which keeps its index when services restart."""
    qdrant = QdrantServer()
    await qdrant.start()
    yield qdrant
    await qdrant.stop()
    await qdrant.engine.close()


@asynccontextmanager
async def searchable(url: str, **settings: Any) -> AsyncGenerator[tuple[Server, Any]]:
    """Yield a server whose search responds, and its stub."""
    async with serving(url, **settings) as server, connected(server.address) as stub:
        await wait_until_searchable(server)
        yield server, stub


async def search(chat: Chat, query: str) -> list[str]:
    """Return the contents of the messages found by meaning, best first."""
    request = message_pb2.SearchMessagesRequest(
        user_id=chat.user_id, query=query, mode=message_pb2.SEARCH_MODE_SEMANTIC
    )
    return [hit.message.content for hit in (await chat.stub.SearchMessages(request)).hits]


async def wait_until_found(chat: Chat, text: str) -> None:
    """Wait until the search for a message's text finds that message first."""

    async def is_found() -> bool:
        try:
            return (await search(chat, text))[:1] == [text]
        except aio.AioRpcError as error:
            if read_failure(error).reason != "SEARCH_UNAVAILABLE":
                raise
            return False

    await wait_until(is_found, f"found by meaning: {text}")


async def live_collection(server: Server) -> str | None:
    """Return the collection that searches of a server use."""
    assert isinstance(server.search, Search)
    assert server.search._index is not None
    return await server.search._index.live_collection()


class Follower:
    """A client that watches a session until the stream ends."""

    def __init__(self, chat: Chat, session_id: str, after_seq: int = 0) -> None:
        self.seqs: list[int] = []
        self._call = chat.watch(session_id, after_seq)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for reply in self._call:
            self.seqs.append(reply.message.seq)

    async def reaches(self, seq: int) -> None:
        async with asyncio.timeout(ENOUGH):
            while seq not in self.seqs:
                assert not self._task.done(), f"the stream ended after {self.seqs}"
                await asyncio.sleep(0.01)

    async def ends(self) -> Failure:
        async with asyncio.timeout(ENOUGH):
            return await failure_of(self._task)

    async def leave(self) -> None:
        """End the stream, which must still be open."""
        assert not self._task.done(), f"the stream ended after {self.seqs}"
        self._call.cancel()
        await asyncio.wait([self._task])


async def test_restore_of_a_dump_under_the_running_service_is_noticed(
    url: str, qdrant: QdrantServer, tmp_path: Path
) -> None:
    dump = str(tmp_path / "dump")
    async with searchable(url, **qdrant.settings) as (server, stub):
        chat = await Chat.of_new_user(stub)
        lighthouse, pump = new_message(LIGHTHOUSE), new_message(PUMP)
        session_id = await chat.start([lighthouse, pump, *new_messages(2)])
        await wait_until_indexed(server)
        await wait_until_built(server)
        before = await live_collection(server)
        await asyncio.to_thread(run_program, "pg_dump", "--format=custom", f"--file={dump}", url)
        await chat.append(session_id, new_messages(2, "lost"))
        await chat.update(session_id, lighthouse.id, content=BREAD)
        await chat.delete(session_id, pump.id)
        await wait_until_indexed(server)
        known_epoch, _ = await stored_epoch(url)
        follower = Follower(chat, session_id)
        await follower.reaches(6)

        restore = ("--clean", "--if-exists", "--exit-on-error", "--single-transaction")
        await asyncio.to_thread(run_program, "pg_restore", *restore, f"--dbname={url}", dump)

        ended = await follower.ends()
        assert (ended.reason, ended.metadata) == (
            "HISTORY_RESTORED",
            {"session_id": session_id, "last_seq": "4"},
        )
        assert follower.seqs == [1, 3, 4, 5, 6]
        await assert_fails(anext(aiter(chat.watch(session_id, 6))), "HISTORY_RESTORED", last_seq=4)
        # No reindex, and no write: the index follows.
        await wait_until_found(chat, PUMP)
        await wait_until_found(chat, LIGHTHOUSE)
        await wait_until_indexed(server)
        await wait_until_built(server)
        await assert_index_equals_postgres(url, server, qdrant)
        assert await live_collection(server) != before
        assert (await stored_epoch(url))[0] != known_epoch
        reply = await chat.append(session_id, "next")
        assert [entry.seq for entry in reply.messages] == [5]
        await assert_index_equals_postgres(url, server, qdrant)


async def test_follower_of_lost_messages_ends_although_others_took_their_seqs(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No poll shows the lower `last_seq`: another replica appends until it is higher again."""
    monkeypatch.setattr(watch, "POLL_INTERVAL_S", 600.0)
    async with (
        serving(url) as server,
        connected(server.address) as stub,
        serving(url) as replica,
        connected(replica.address) as other_stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(6))
        follower = Follower(chat, session_id)
        await follower.reaches(6)
        await lose_messages(url, session_id, after_seq=4)
        await Chat(other_stub, chat.user_id).append(session_id, new_messages(3, "other"))
        await chat.append(session_id, "eight")
        ended = await follower.ends()
    assert (ended.reason, ended.metadata["last_seq"]) == ("HISTORY_RESTORED", "8")
    assert follower.seqs == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("lost_after_seq", [4, 5])
async def test_follower_of_lost_messages_ends_while_nothing_is_appended(
    url: str, lost_after_seq: int
) -> None:
    async with serving(url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(6))
        followers = [Follower(chat, session_id), Follower(chat, session_id, after_seq=6)]
        await followers[0].reaches(6)
        await lose_messages(url, session_id, after_seq=lost_after_seq)
        for follower in followers:
            ended = await follower.ends()
            assert ended.reason == "HISTORY_RESTORED"
            assert ended.metadata["last_seq"] == str(lost_after_seq)


async def test_failover_that_lost_nothing_interrupts_no_watch(
    own_cluster: Cluster, url: str, qdrant: QdrantServer
) -> None:
    async with searchable(url, **qdrant.settings) as (server, stub):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await wait_until_indexed(server)
        await wait_until_built(server)
        before = await live_collection(server)
        epoch, counter = await stored_epoch(url)
        follower = Follower(chat, session_id)
        for seq in (2, 3, 4):
            await asyncio.to_thread(own_cluster.postgres.stop)
            await asyncio.to_thread(own_cluster.postgres.start)
            await chat.append(session_id, "more")
            await follower.reaches(seq)
        await wait_until_indexed(server)
        assert follower.seqs == [1, 2, 3, 4]
        await follower.leave()
        assert await live_collection(server) == before
        after = await stored_epoch(url)
        assert after[0] == epoch
        assert after[1] > counter
        await assert_index_equals_postgres(url, server, qdrant)


async def test_lower_counter_ends_the_watches_of_every_process(url: str) -> None:
    """Also of sessions that were not changed: what else the client has read may be lost."""
    async with (
        serving(url) as server,
        connected(server.address) as stub,
        serving(url) as replica,
        connected(replica.address) as other_stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(new_messages(2))
        followers = [
            Follower(chat, session_id),
            Follower(Chat(other_stub, chat.user_id), session_id),
        ]
        for process, follower in zip((server, replica), followers, strict=True):
            await process.epoch.raise_mark()
            await follower.reaches(2)
        before, _ = await stored_epoch(url)
        await set_counter(url, 0)
        for follower in followers:
            ended = await follower.ends()
            assert (ended.reason, ended.metadata["last_seq"]) == ("HISTORY_RESTORED", "2")
        after, _ = await stored_epoch(url)
        assert after != before
        marks = [process.epoch.mark for process in (server, replica)]
        assert [mark.epoch for mark in marks if mark is not None] == [after, after]
        # A watch that is opened afterwards goes on.
        follower = Follower(chat, session_id, after_seq=2)
        await chat.append(session_id, "next")
        await follower.reaches(3)
        await follower.leave()


async def test_index_that_is_ahead_is_rebuilt_before_it_is_written(
    url: str, qdrant: QdrantServer
) -> None:
    """Another process has written the index, and a failover lost what that process had read."""
    async with searchable(url, **qdrant.settings) as (server, stub):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start(LIGHTHOUSE)
        await wait_until_indexed(server)
        await wait_until_built(server)
        before = await live_collection(server)
        assert before is not None
        epoch, counter = await stored_epoch(url)
        assert server.search.dimensions is not None
        payload = {**MARK_POINT._asdict(), "epoch": epoch, "counter": counter + 1000}
        vector = [1.0] * server.search.dimensions
        mark = models.PointStruct(id=MARK_POINT.id, vector=vector, payload=payload)
        await qdrant.engine.upsert(before, [mark])
        await chat.append(session_id, PUMP)
        await wait_until_found(chat, PUMP)
        await wait_until_built(server)
        await assert_index_equals_postgres(url, server, qdrant)
        assert await live_collection(server) != before
        assert (await stored_epoch(url))[0] == epoch


async def test_folder_that_is_put_back_is_noticed_at_the_start(
    own_cluster: Cluster, url: str, tmp_path: Path
) -> None:
    """The folder of PostgreSQL is put back while the service is stopped, and not the index."""
    settings = {"search": "on", "data_dir": tmp_path}
    async with searchable(url, **settings) as (server, stub):
        chat = await Chat.of_new_user(stub)
        lighthouse = new_message(LIGHTHOUSE)
        session_id = await chat.start([lighthouse, new_message("Boats leave the harbour at night")])
        await wait_until_found(chat, LIGHTHOUSE)
        await wait_until_built(server)
        built = await live_collection(server)
    await asyncio.to_thread(own_cluster.postgres.stop)
    copy = own_cluster.folder / "copy"
    await asyncio.to_thread(
        subprocess.run, ["cp", "-a", str(own_cluster.pgdata), str(copy)], check=True
    )
    await asyncio.to_thread(own_cluster.postgres.start)
    async with searchable(url, **settings) as (server, stub):
        chat = Chat(stub, chat.user_id)
        # A start on the same history rebuilds nothing.
        assert await live_collection(server) == built
        await chat.update(session_id, lighthouse.id, content=BREAD)
        await wait_until_found(chat, BREAD)
        await wait_until_built(server)
        assert await live_collection(server) == built
    await asyncio.to_thread(own_cluster.postgres.stop)
    await asyncio.to_thread(subprocess.run, ["rm", "-rf", str(own_cluster.pgdata)], check=True)
    copy.rename(own_cluster.pgdata)
    await asyncio.to_thread(own_cluster.postgres.start)
    async with searchable(url, **settings) as (server, stub):
        chat = Chat(stub, chat.user_id)
        await wait_until_found(chat, LIGHTHOUSE)
        await wait_until_built(server)
        assert await live_collection(server) != built


async def test_restore_during_a_rebuild_begins_it_again(url: str, qdrant: QdrantServer) -> None:
    """The state of the rebuild goes back, too: it names a collection that no longer exists."""
    async with searchable(url, **qdrant.settings) as (server, stub):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start([new_message(LIGHTHOUSE), new_message(PUMP)])
        await wait_until_indexed(server)
        await wait_until_built(server)
        await server.epoch.raise_mark()
        await set_building(url, "a collection that was dropped")
        await set_counter(url, 0)
        await chat.append(session_id, BREAD)
        await wait_until_found(chat, BREAD)
        await wait_until_built(server)
        assert len(await qdrant.collections()) == 1
        await assert_index_equals_postgres(url, server, qdrant)
