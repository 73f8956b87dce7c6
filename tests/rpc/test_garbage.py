"""Calls end without garbage that only a collection of the garbage collector frees.

A full collection of what thousands of calls have left holds the event loop for 0.1 s and more.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from chathistory.v1 import message_pb2, session_pb2
from grpc import aio

from tests.support.chat import Chat, new_id
from tests.support.failures import failure_of

CALLS = 20


@contextmanager
def collected() -> Iterator[Counter[str]]:
    """Count the objects, by their types, that become garbage in the block."""
    counts: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield counts
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        counts.update(type(item).__name__ for item in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def starts_a_session(chat: Chat) -> None:
    await chat.start()


async def lists_sessions(chat: Chat) -> None:
    await chat.stub.ListSessions(session_pb2.ListSessionsRequest(user_id=chat.user_id))


async def names_an_unknown_session(chat: Chat) -> None:
    await failure_of(chat.get_session(new_id()))


async def sends_an_invalid_field(chat: Chat) -> None:
    await failure_of(chat.get_session("x"))


async def watches_an_unknown_session(chat: Chat) -> None:
    request = message_pb2.WatchMessagesRequest(user_id=chat.user_id, session_id=new_id())
    with pytest.raises(aio.AioRpcError):
        async for _ in chat.stub.WatchMessages(request):
            pass


@pytest.mark.parametrize(
    "call",
    [
        starts_a_session,
        lists_sessions,
        names_an_unknown_session,
        sends_an_invalid_field,
        watches_an_unknown_session,
    ],
)
async def test_call_leaves_no_garbage(chat: Chat, call: Callable[[Chat], Awaitable[None]]) -> None:
    await call(chat)
    with collected() as counts:
        for _ in range(CALLS):
            await call(chat)
    # The client of the test runs in this process, and leaves other objects.
    assert not {"_ServicerContext", "RPCState", "Call", "ServiceError"} & counts.keys()
