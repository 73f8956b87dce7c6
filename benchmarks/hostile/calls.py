"""Calls with serialised messages, and their statuses."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from benchmarks.hostile.matrix import SERVICE, STREAMS

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    # Each channel gets a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
)


def unary_method(channel: aio.Channel, rpc: str) -> aio.UnaryUnaryMultiCallable[bytes, bytes]:
    """Return the method of an RPC, for serialised messages."""
    path = f"/{SERVICE.full_name}/{rpc}"
    return channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)


def stream_method(channel: aio.Channel, rpc: str) -> aio.UnaryStreamMultiCallable[bytes, bytes]:
    """Return the method of an RPC whose replies are a stream, for serialised messages."""
    path = f"/{SERVICE.full_name}/{rpc}"
    return channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)


async def call(
    channel: aio.Channel,
    rpc: str,
    body: bytes,
    metadata: Sequence[tuple[str, str]],
    timeout_s: float,
) -> str:
    """Make one call and return its status, with the reason of a failure."""
    try:
        if rpc in STREAMS:
            stream = stream_method(channel, rpc)(body, metadata=metadata, timeout=timeout_s)
            async for _ in stream:
                pass
        else:
            await unary_method(channel, rpc)(body, metadata=metadata, timeout=timeout_s)
    except aio.AioRpcError as error:
        return status_of(error)
    except (aio.UsageError, grpc.RpcError, ValueError) as error:
        return type(error).__name__
    return "OK"


def status_of(error: aio.AioRpcError) -> str:
    """Return the code of a failed call, with the service's reason where it sent one."""
    code = error.code().name
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        return code
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return f"{code} {info.reason}"
    return code
