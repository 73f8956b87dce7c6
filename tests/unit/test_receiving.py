"""Receiving of requests, in races that a client cannot cause on purpose."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from service.auth.caller import Caller
from service.rpc.receiving import RequestReceiver

USER_ID = "0192d3a4-0000-7000-8000-000000000001"


class FakeContext:
    """The context of a call whose request arrives when the test says so."""

    def __init__(self) -> None:
        self.request: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.is_aborted = False

    async def read(self) -> bytes:
        data = await self.request
        if self.is_aborted:
            raise aio.AbortError
        return data

    async def abort(self, *_status: Any) -> None:
        self.is_aborted = True
        if not self.request.done():
            self.request.set_result(b"")
        raise aio.AbortError


async def expired_while_arriving(*, arrives_first: bool) -> tuple[FakeContext, Any]:
    """Let a request arrive in the turn of the event loop in which its time is up."""
    context: Any = FakeContext()
    receiver = RequestReceiver(timeout_s=0)
    received = asyncio.create_task(receiver.receive(context, Caller(user_id=USER_ID)))
    await asyncio.sleep(0.01)
    for step in (
        (lambda: context.request.set_result(b"request"), receiver._sweep)
        if arrives_first
        else (receiver._sweep, lambda: context.request.set_result(b"request"))
    ):
        step()
    (result,) = await asyncio.gather(received, return_exceptions=True)
    await asyncio.sleep(0.01)
    receiver.close()
    return context, result


async def test_request_that_arrives_before_its_call_is_ended_is_served() -> None:
    """A call that is served and also ended with an error would be repeated by the client."""
    context, result = await expired_while_arriving(arrives_first=True)
    assert result == b"request"
    assert not context.is_aborted


async def test_call_that_is_ended_before_its_request_arrives_is_not_served() -> None:
    context, result = await expired_while_arriving(arrives_first=False)
    assert isinstance(result, aio.AbortError)
    assert context.is_aborted
