"""The service is killed: acknowledged messages are stored, and retries store no duplicates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from chathistory.v1 import message_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from grpc import StatusCode, aio

from tests.support.chat import Chat, new_id, new_messages
from tests.support.cluster import fetch
from tests.support.history import read_valid_history
from tests.support.load import Load, fast_reconnect_options
from tests.support.proxy import Direction, Proxy, postgres_proxy
from tests.support.servers import ServerProcess, channel, connected


async def wait_until_stored(database_url: str, message_id: str) -> None:
    """Wait until a message is committed."""
    async with asyncio.timeout(20):
        while not await fetch(database_url, "SELECT FROM chat_messages WHERE id = $1", message_id):
            await asyncio.sleep(0.01)


async def assert_retry_is_a_replay(
    database_url: str, folder: Path, request: message_pb2.AppendMessagesRequest
) -> None:
    """Send a request to a new process; it must find the messages that the killed one has stored."""
    async with ServerProcess(database_url, folder) as process, connected(process.address) as stub:
        reply = await stub.AppendMessages(request)
        assert [entry.replayed for entry in reply.messages] == [True] * len(request.messages)
        assert not reply.session_created
        stored = await read_valid_history(database_url, request.user_id, reply.session_id)
        stored.check_contains([reply])
        assert stored.last_seq == len(request.messages)


async def kill_during_call(
    process: ServerProcess, call: Any, database_url: str, message_id: str
) -> None:
    await wait_until_stored(database_url, message_id)
    assert not call.done()
    await process.kill()
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == StatusCode.UNAVAILABLE


async def test_retry_is_a_replay_when_the_service_was_killed_before_its_reply(
    database_url: str, tmp_path: Path
) -> None:
    """The reply to the client is blocked; once the row is stored, the process is killed."""
    async with (
        ServerProcess(database_url, tmp_path / "first") as process,
        Proxy(process.address) as proxy,
        connected(proxy.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        messages = new_messages(3)
        request = message_pb2.AppendMessagesRequest(user_id=chat.user_id, messages=messages)
        proxy.block(Direction.TO_CLIENT)
        call = stub.AppendMessages(request)
        await wait_until_stored(database_url, messages[0].id)
        assert not call.done()
        await process.kill()
        proxy.reset_connections()
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == StatusCode.UNAVAILABLE
    await assert_retry_is_a_replay(database_url, tmp_path / "second", request)


async def test_retry_is_a_replay_when_the_service_was_killed_before_it_knew_of_the_commit(
    database_url: str, tmp_path: Path
) -> None:
    """PostgreSQL's reply is blocked; once the row is stored, the process is killed."""
    async with (
        postgres_proxy(database_url) as (proxy, url),
        ServerProcess(url, tmp_path / "first") as process,
        connected(process.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        # Prepares the statement, so that the next append is sent in one piece.
        await chat.start()
        messages = new_messages(3)
        request = message_pb2.AppendMessagesRequest(user_id=chat.user_id, messages=messages)
        proxy.block(Direction.TO_CLIENT)
        await kill_during_call(process, stub.AppendMessages(request), database_url, messages[0].id)
    await assert_retry_is_a_replay(database_url, tmp_path / "second", request)


async def test_retry_stores_once_when_the_service_was_killed_during_the_statement(
    database_url: str, tmp_path: Path
) -> None:
    """PostgreSQL may complete the statement after the kill. The retry stores the messages once."""
    async with (
        ServerProcess(database_url, tmp_path / "first") as process,
        connected(process.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        calls = [
            chat.stub.AppendMessages(
                message_pb2.AppendMessagesRequest(
                    user_id=chat.user_id, session_id=session_id, messages=new_messages(20)
                )
            )
            for _ in range(50)
        ]
        requests = [
            message_pb2.AppendMessagesRequest(
                user_id=chat.user_id, session_id=session_id, messages=new_messages(20)
            )
            for _ in range(50)
        ]
        calls += [chat.stub.AppendMessages(request) for request in requests]
        await asyncio.wait(
            [asyncio.ensure_future(_reply_of(call)) for call in calls],
            return_when=asyncio.FIRST_COMPLETED,
        )
        await process.kill()
        replies = [
            reply for reply in await asyncio.gather(*map(_reply_of, calls)) if reply is not None
        ]
    async with (
        ServerProcess(database_url, tmp_path / "second") as process,
        connected(process.address) as stub,
    ):
        replies += await asyncio.gather(*map(stub.AppendMessages, requests))
    stored = await read_valid_history(database_url, chat.user_id, session_id)
    stored.check_contains(replies)


async def _reply_of(call: Any) -> message_pb2.AppendMessagesResponse | None:
    """Return the reply of a call, or None if the service was killed."""
    try:
        reply: message_pb2.AppendMessagesResponse = await call
    except aio.AioRpcError as error:
        assert error.code() == StatusCode.UNAVAILABLE, error  # noqa: PT017 - one of two outcomes
        return None
    return reply


async def _kill_under_load(database_url: str, folder: Path, rounds: int) -> None:
    process = await ServerProcess(database_url, folder / "0").start()
    address = process.address
    async with channel(address, **fast_reconnect_options()) as connection:
        load = Load(await Chat.of_new_user(Stub(connection)))
        async with load.running():
            for turn in range(1, rounds + 1):
                await load.wait_for_appends(200)
                await process.kill()
                await process.stop()
                process = await ServerProcess(
                    database_url, folder / f"{turn}", CHAT_HISTORY_LISTEN=address
                ).start()
            await load.wait_for_appends(200)
    await process.stop()
    await load.check(database_url)
    assert load.count >= 200 * (rounds + 1)
    print(f"{load.count} messages, refusals {load.refusals}")


@pytest.mark.case(n=15)
async def test_no_append_is_lost_when_the_service_is_killed_under_load(
    database_url: str, tmp_path: Path
) -> None:
    await _kill_under_load(database_url, tmp_path, rounds=2)


@pytest.mark.case(n=15)
@pytest.mark.faults
@pytest.mark.timeout(300)
async def test_no_append_is_lost_when_the_service_is_killed_under_load_repeatedly(
    database_url: str, tmp_path: Path
) -> None:
    await _kill_under_load(database_url, tmp_path, rounds=15)


async def test_session_is_created_once_when_the_first_server_was_killed(
    database_url: str, tmp_path: Path
) -> None:
    """Of 50 identical appends, 25 go to a server that is killed and 25 to another one."""
    async with (
        ServerProcess(database_url, tmp_path / "first") as process,
        connected(process.address) as stub,
    ):
        chat = await Chat.of_new_user(stub)
        request = message_pb2.AppendMessagesRequest(
            user_id=chat.user_id,
            session_id=new_id(),
            create_if_missing=True,
            messages=new_messages(2),
        )
        calls = [stub.AppendMessages(request) for _ in range(25)]
        await process.kill()
        replies = [
            reply for reply in await asyncio.gather(*map(_reply_of, calls)) if reply is not None
        ]
    async with (
        ServerProcess(database_url, tmp_path / "second") as process,
        connected(process.address) as stub,
    ):
        replies += await asyncio.gather(*(stub.AppendMessages(request) for _ in range(25)))
    stored = await read_valid_history(database_url, chat.user_id, request.session_id)
    stored.check_contains(replies)
    assert stored.last_seq == 2
