"""Fuzzes a server in a process of its own with mutated requests: `make fuzz CASES=100000`.

Recorded requests of every RPC are mutated, some with mutated tokens. Every answer must have a
documented status other than UNKNOWN and INTERNAL, and no text of the driver. No forged token may be
accepted, the server must survive, and its memory must return to the baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chathistory.v1 import message_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2 import DESCRIPTOR
from grpc import StatusCode, aio
from grpc.aio import EOF  # type: ignore[attr-defined]

from tests.security import hostile
from tests.security.test_matrix import ROWS, SHOWN, Things, make_things
from tests.support import issuer
from tests.support.chat import new_id
from tests.support.cluster import Cluster
from tests.support.failures import read_failure
from tests.support.servers import AsyncStub, ServerProcess, channel, defects_in
from tests.support.untyped_messages import Message, Part, Session, User

SERVICE = DESCRIPTOR.services_by_name["ChatHistoryService"]
STREAMS = {method.name for method in SERVICE.methods if method.server_streaming}
ROUND = 500
"""Cases between two new sets of resources: the mutated requests have deleted the old ones."""
CONCURRENT_CALLS = 32
WATCH_SECONDS = 0.05


@dataclass
class Report:
    """The results of a run."""

    cases: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    grown_mib: float = 0.0
    seconds: float = 0.0


def recorded(things: Things) -> list[tuple[str, bytes]]:
    """Return requests of every RPC: small ones, and some with all fields."""
    requests = [
        (rpc, row.request(things.user, things).SerializeToString()) for rpc, row in ROWS.items()
    ]
    parts = [
        Part(tool_call={"id": "c", "name": "f", "arguments": "{}"}),
        Part(tool_result={"tool_call_id": "c", "content": "x"}),
        Part(data={"a": {"b": [1, None, "x"]}}),
        Part(file={"uri": "https://example.com", "size_bytes": 7}),
    ]
    full = Message(
        id=new_id(),
        role=message_pb2.ROLE_ASSISTANT,
        content="all of it",
        parts=parts,
        metadata={"k": [True, {"n": 1.5}]},
        token_count=3,
        author="me",
        feedback={"score": 0.5, "comment": "fine"},
    )
    append = message_pb2.AppendMessagesRequest(
        user_id=things.user,
        session_id=things.session,
        messages=[full, Message(role=1, content="b")],
        expected_last_seq=1,
        create_if_missing=True,
        session=Session(title="t", metadata={"a": "b"}),
    )
    user = user_pb2.UpdateUserRequest(
        user_id=things.user, user=User(name="n", email="a@example.com", metadata={"a": 1})
    )
    user.update_mask.paths.extend(["name", "email", "metadata"])
    # The hot path is mutated most.
    return [
        *requests,
        *[("AppendMessages", append.SerializeToString())] * 10,
        ("UpdateUser", user.SerializeToString()),
    ]


class _Fuzzer:
    def __init__(self, opened: aio.Channel, seed: int) -> None:
        self.report = Report()
        self._chance = random.Random(seed)
        self._opened = opened
        self._stub = AsyncStub(opened)
        self._calls = {rpc: self._raw(rpc) for rpc in ROWS}
        self._good_token = issuer.service_token()

    def _raw(
        self, rpc: str
    ) -> aio.UnaryUnaryMultiCallable[bytes, bytes] | aio.UnaryStreamMultiCallable[bytes, bytes]:
        make = self._opened.unary_stream if rpc in STREAMS else self._opened.unary_unary
        return make(
            f"/{SERVICE.full_name}/{rpc}", request_serializer=bytes, response_deserializer=bytes
        )

    async def round(self, cases: int) -> None:
        """Run `cases` cases on new resources."""
        known = recorded(await make_things(self._stub))
        todo = []
        for _ in range(cases):
            rpc, data = self._chance.choice(known)
            todo.append(
                (
                    rpc,
                    hostile.mutated(data, self._chance.choice(known)[1], self._chance),
                    self._shown(),
                )
            )
        queue = iter(todo)
        await asyncio.gather(*(self._work(queue) for _ in range(CONCURRENT_CALLS)))

    def _shown(self) -> tuple[str, bool]:
        """Return a token, and whether it must be rejected."""
        if self._chance.random() > 0.05:
            return self._good_token, False
        bent = hostile.mutated(self._good_token.encode(), b"eyJhbGciOiJub25lIn0..", self._chance)[
            :4000
        ]
        text = "".join(chr(byte) for byte in bent if 0x20 < byte < 0x7F)
        return text, text.rstrip("=") != self._good_token  # Padding is not significant.

    async def _work(self, queue: object) -> None:
        for rpc, data, (token, refuse) in queue:  # type: ignore[attr-defined]
            code = await self._send(rpc, data, token, timeout_s=30 if refuse else WATCH_SECONDS)
            self.report.cases += 1
            self.report.codes[code] += 1
            if refuse and code != "UNAUTHENTICATED":
                self.report.problems.append(f"{rpc}: {code} with the token {token!r}")

    async def _send(self, rpc: str, data: bytes, token: str, *, timeout_s: float) -> str:
        call = self._calls[rpc](
            data,
            metadata=issuer.bearer_metadata(token),
            timeout=timeout_s if rpc == "WatchMessages" else 30,
        )
        try:
            if rpc in STREAMS:
                while await call.read() is not EOF:  # type: ignore[union-attr]
                    pass
            else:
                await call  # type: ignore[misc]
        except aio.AioRpcError as error:
            if rpc == "WatchMessages" and error.code() is StatusCode.DEADLINE_EXCEEDED:
                return "WATCHED"
            try:
                failed = str(read_failure(error)).lower()
            except AssertionError as problem:
                failed = ""
                self.report.problems.append(f"{rpc} {data!r}: {problem}")
            words = [word for word in hostile.DRIVER_WORDS if word in failed]
            if words or error.code() in (StatusCode.UNKNOWN, StatusCode.INTERNAL):
                self.report.problems.append(
                    f"{rpc} {data!r}: {error.code()} {error.details()} {words}"
                )
            return error.code().name
        return "OK"


async def run(database_url: str, folder: Path, *, cases: int, seed: int) -> Report:
    """Fuzz a server on a migrated database; it is started in `folder`."""
    started = time.monotonic()
    server = ServerProcess(
        database_url,
        folder / "server",
        CHAT_HISTORY_AUTH="jwt",
        CHAT_HISTORY_JWT_KEY=issuer.SECRET,
        CHAT_HISTORY_JWT_AUDIENCE=issuer.AUDIENCE,
        CHAT_HISTORY_SEARCH="off",
    )
    async with server, channel(server.address) as opened:
        fuzzer = _Fuzzer(opened, seed)
        await fuzzer.round(min(cases, ROUND))  # Fills pools and caches.
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        while fuzzer.report.cases < cases:
            await fuzzer.round(min(ROUND, cases - fuzzer.report.cases))
        await AsyncStub(opened).ListUsers(user_pb2.ListUsersRequest(), metadata=SHOWN)
        fuzzer.report.grown_mib = (process.memory_info().rss - before) / 2**20
    log = server.log.read_text()
    fuzzer.report.problems += [line for line in log.splitlines() if "internal error" in line]
    for line in defects_in(log):
        fuzzer.report.problems.append(f"in the log:\n{line}")
    fuzzer.report.seconds = time.monotonic() - started
    return fuzzer.report


async def _whole(cases: int, seed: int) -> Report:
    with Cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        await cluster.prepare()
        return await run(
            cluster.url(await cluster.create_database()), Path(folder), cases=cases, seed=seed
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    report = asyncio.run(_whole(arguments.cases, arguments.seed))
    print(f"{report.cases} cases in {report.seconds:.0f} s: {dict(report.codes.most_common())}")
    print(f"memory grew by {report.grown_mib:.0f} MiB")
    for problem in report.problems[:20]:
        print(problem[:2000])
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
