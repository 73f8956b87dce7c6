"""The process of the other user, `python -m benchmarks.hostile.probe`.

It measures only while asked to: after a line `start` on its input it makes small calls, one at a
time in each of three loops, and checks the liveness of the service. After a line `stop` it prints
the measurements. It runs in a process of its own and with a raised priority where that is allowed,
so that the work of the attacker's process does not delay it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from typing import Any

import uvloop
from chathistory.v1 import document_pb2, message_pb2, session_pb2, user_pb2
from grpc import aio
from grpc_health.v1 import health_pb2

from benchmarks.hostile.account import Account
from benchmarks.hostile.calls import CHANNEL_OPTIONS, call

INTERVAL_S = 0.01
"""Time between the starts of two appends, and of two reads, unless a call takes longer."""
LIVENESS_INTERVAL_S = 0.02
OTHER_INTERVAL_S = 0.2
CALL_TIMEOUT_S = 10.0
_NICENESS = -5


def main() -> None:
    """Measure whenever the input says so."""
    with suppress(OSError):
        os.nice(_NICENESS)
    account = Account.from_json(sys.stdin.readline())
    uvloop.run(_serve(account, is_search_on=sys.stdin.readline().strip() == "on"))


async def _serve(account: Account, *, is_search_on: bool) -> None:
    async with (
        aio.insecure_channel(account.address, options=CHANNEL_OPTIONS) as channel,
        aio.insecure_channel(account.address, options=CHANNEL_OPTIONS) as health,
    ):
        probe = Probe(account, channel, health, is_search_on=is_search_on)
        print("ready", flush=True)  # noqa: T201 - read by the parent process
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line == "start\n":
                probe.start()
            else:
                print(json.dumps(await probe.stop()), flush=True)  # noqa: T201 - as above


class Probe:
    """The calls of one user, and their measurements."""

    def __init__(
        self, account: Account, channel: aio.Channel, health: aio.Channel, *, is_search_on: bool
    ) -> None:
        self._account = account
        self._channel = channel
        self._metadata = account.metadata()
        self._session_id = ""
        self._is_search_on = is_search_on
        self._check: Any = health.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = asyncio.Event()
        self.durations_s: dict[str, list[float]] = {}
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin a measurement, with a new session."""
        self._session_id = str(uuid.uuid4())
        self._stopped.clear()
        self.durations_s = {"append": [], "read": [], "other": [], "liveness": []}
        self.failures = []
        loops = (
            ("append", self._appends(), INTERVAL_S),
            ("read", self._reads(), INTERVAL_S),
            ("other", self._others(), OTHER_INTERVAL_S),
        )
        self._tasks = [asyncio.create_task(self._loop(*loop)) for loop in loops]
        self._tasks.append(asyncio.create_task(self._liveness()))

    async def stop(self) -> dict[str, Any]:
        """End the measurement after the calls in flight, and return it."""
        self._stopped.set()
        await asyncio.gather(*self._tasks)
        return {"durations_s": self.durations_s, "failures": self.failures}

    async def _loop(self, name: str, calls: Iterator[tuple[str, bytes]], interval_s: float) -> None:
        for rpc, body in calls:
            started = time.perf_counter()
            status = await call(self._channel, rpc, body, self._metadata, CALL_TIMEOUT_S)
            duration_s = time.perf_counter() - started
            self.durations_s[name].append(duration_s)
            if status != "OK":
                self.failures.append(f"{rpc} {status}")
            if await self._stops_within(max(interval_s - duration_s, 0.0)):
                return

    async def _stops_within(self, delay_s: float) -> bool:
        """Wait, and return early with True once the measurement is to end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), delay_s)
        return self._stopped.is_set()

    async def _liveness(self) -> None:
        request = health_pb2.HealthCheckRequest(service="liveness")
        is_stopped = False
        while not is_stopped:
            started = time.perf_counter()
            try:
                reply = await self._check(request, timeout=CALL_TIMEOUT_S)
                if reply.status != health_pb2.HealthCheckResponse.SERVING:
                    self.failures.append("liveness is not SERVING")
            except aio.AioRpcError as error:
                self.failures.append(f"liveness {error.code().name}")
            self.durations_s["liveness"].append(time.perf_counter() - started)
            is_stopped = await self._stops_within(LIVENESS_INTERVAL_S)

    def _appends(self) -> Iterator[tuple[str, bytes]]:
        # The first call creates the session, which the other loops may find missing until then;
        # they use a session that exists.
        while True:
            message = message_pb2.Message(
                id=str(uuid.uuid4()), role=message_pb2.ROLE_USER, content="hello"
            )
            yield (
                "AppendMessages",
                message_pb2.AppendMessagesRequest(
                    user_id=self._account.user_id,
                    session_id=self._session_id,
                    messages=[message],
                    create_if_missing=True,
                ).SerializeToString(),
            )

    def _reads(self) -> Iterator[tuple[str, bytes]]:
        user_id, session_id = self._account.user_id, self._account.sessions["short"]
        context = message_pb2.GetContextRequest(user_id=user_id, session_id=session_id)
        page = message_pb2.ListMessagesRequest(user_id=user_id, session_id=session_id, page_size=20)
        return cycle(
            (
                ("GetContext", context.SerializeToString()),
                ("ListMessages", page.SerializeToString()),
            )
        )

    def _others(self) -> Iterator[tuple[str, bytes]]:
        account = self._account
        user_id = account.user_id
        session_id, scratch_id = account.sessions["short"], account.sessions["scratch"]
        calls = [
            ("GetUser", user_pb2.GetUserRequest(user_id=user_id)),
            ("GetSession", session_pb2.GetSessionRequest(user_id=user_id, session_id=session_id)),
            ("ListSessions", session_pb2.ListSessionsRequest(user_id=user_id, page_size=5)),
            (
                "UpdateSession",
                session_pb2.UpdateSessionRequest(
                    user_id=user_id, session=session_pb2.Session(id=scratch_id, title="title")
                ),
            ),
            (
                "SearchMessages",
                message_pb2.SearchMessagesRequest(
                    user_id=user_id,
                    query="hello",
                    session_id=session_id,
                    mode=message_pb2.SEARCH_MODE_LEXICAL,
                ),
            ),
        ]
        if self._is_search_on:
            search = document_pb2.SearchDocumentsRequest(user_id=user_id, query="hello world")
            calls.append(("SearchDocuments", search))
        return cycle([(rpc, request.SerializeToString()) for rpc, request in calls])


if __name__ == "__main__":
    main()
